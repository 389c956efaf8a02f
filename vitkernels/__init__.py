"""Fast vision-transformer kernels for the models you already have.

``vitkernels.accelerate(model)`` replaces what it knows in a model from timm, transformers or ml-cvnets by fused kernels, in place: same weights, same
outputs, same state_dict. ``vitkernels.ops`` is the functional API below it, ``vitkernels.nn`` the modules.
"""

from vitkernels import nn, ops
from vitkernels._version import __version__
from vitkernels.allocator import tune_allocator
from vitkernels.backends import BackendUnavailable, backend
from vitkernels.explain import explain
from vitkernels.integrations import Handle, accelerate

__all__ = ["BackendUnavailable", "Handle", "__version__", "accelerate", "backend", "explain", "nn", "ops", "tune_allocator"]
