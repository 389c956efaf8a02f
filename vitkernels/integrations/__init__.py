"""Into models: :func:`accelerate` and its :class:`Handle`.

One file per model zoo holds its table: which class becomes which replacement. No zoo is ever imported here; classes are recognised by name.
"""

from vitkernels.integrations._accelerate import Handle, Record, accelerate

__all__ = ["Handle", "Record", "accelerate"]
