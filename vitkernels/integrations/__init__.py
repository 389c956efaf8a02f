"""Into models: :func:`accelerate` and its :class:`Handle`; :func:`register_transformers` for transformers' own way in.

One file per model zoo holds its table: which class becomes which replacement. No zoo is ever imported here; classes are recognised by name.
"""

from vitkernels.integrations._accelerate import Handle, Record, accelerate
from vitkernels.integrations.attention_interface import register_transformers

__all__ = ["Handle", "Record", "accelerate", "register_transformers"]
