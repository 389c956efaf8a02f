"""Layers in evaluation, a few passes over memory: what runs folded, how the zoos' layers are recognised, and the MLPs of transformers.

While a gradient is wanted, in training, under autocast and in a graph that torch.compile makes, the original code runs: it is what there is to train,
and inductor folds by itself. Convolutions, which have more to gain in training, are in ``convolutions.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vitkernels import backends
from vitkernels.integrations._fused import Fused, Role, fell_back, original_class, original_name
from vitkernels.nn import _checks, _folded
from vitkernels.nn._derived import Derived, gradient_wanted
from vitkernels.nn._folded import Bottleneck, Layer, UnfitError, bottleneck, onednn
from vitkernels.ops.bottleneck.op import NAME, bfloat16_products

Run = Callable[..., Tensor | None]
"""A forward; None for an input that the original is to refuse."""
Module = TypeVar("Module", bound=nn.Module)


class Plan(NamedTuple):
    """What a module's forward is made of: ``bind(dtype)`` folds and packs, and gives the forward itself, or why the original is to run."""

    bind: Callable[[torch.dtype], Run | str]


class Evaluated(Fused):
    """Base of what runs folded in evaluation, and otherwise as what it stands in front of."""

    _vk_in_evaluation: ClassVar[bool] = True
    _vk_dims: ClassVar[range] = range(4, 5)
    """Of inputs that it takes."""

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        """The adapter's one duty.

        Raises:
            UnfitError: the module's layers cannot run so.
        """
        raise NotImplementedError

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        """The attributes of ``module``, and those of layers below it that are no settings of PyTorch's own layers, that the plan reads."""
        return None

    def _vk_left(self, reason: str) -> None:
        """A call cannot run folded, for a reason that is worth reporting."""
        fell_back(self, reason)

    def _vk_trained(self, x: Tensor) -> Tensor | None:
        """The forward in training, or None for the original's."""
        return None

    def _vk_folded(self, x: Any, *more: Any) -> Tensor | None:
        """The folded forward, given ``more`` of what a plan of this class takes, or that in training, or None where this call is not for it."""
        if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or not here(x) or x.dim() not in self._vk_dims:
            return None
        if self.training:
            _plans.forget(self)
            return self._vk_trained(x)
        entry = _plans.entry(self)
        plan = entry.plan
        if gradient_wanted((x,), entry.snapshot.tensors):
            entry.forget()
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        reason = _checks.why_not_tensor(x)
        if isinstance(plan, str):
            reason = reason or plan
        elif reason is None:
            bind = plan.bind
            bound = entry.value(x.dtype, lambda: _folded.why_not_tensors(x, entry.snapshot.tensors) or bind(x.dtype))
            if not isinstance(bound, str):
                return bound(x, *more)
            reason = bound
        self._vk_left(reason)
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The original's arguments and result."""
        alone = bool(args) and all(value is None or value is False for value in (*args[1:], *kwargs.values()))
        y = self._vk_folded(args[0]) if alone else None
        return super().forward(*args, **kwargs) if y is None else y


class Folded(Evaluated):
    """Base of what runs folded in evaluation and is the original otherwise."""

    _vk_op: ClassVar[str] = NAME

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        reason = plan_of(cls, module)
        if isinstance(reason, str):
            return reason
        return "folding is for the CPU" if cls._vk_weight(module).is_cuda else None

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(module.parameters())

    @classmethod
    def _vk_backend(cls, module: Any) -> str:
        return "native" if here(cls._vk_weight(module)) else "reference"


def here(x: Tensor) -> bool:
    """Whether the kernels run on tensors like this, and nobody asked for others."""
    return x.device.type == "cpu" and backends.requested() in ("auto", "native") and backends.why_not(NAME, "native", x.device, x.dtype) is None


def plan_of(cls: type[Evaluated], module: Any) -> Plan | str:
    """How ``module`` would run folded, or why it cannot."""
    if (reason := hooked_inside(module)) is not None:
        return reason
    try:
        return cls._vk_plan(module)
    except UnfitError as error:
        return str(error)


def hooked_inside(module: Any) -> str | None:
    """Which layer below ``module`` does more than its class's forward."""
    for child in module.modules():
        if child is not module and _checks.hooked(child):
            return f"its {type(child).__name__} {_checks.HOOKED}"
        if child is not module and "forward" in child.__dict__:
            return f"the forward of its {type(child).__name__} is overridden on the instance"
    return None


def _plan_now(module: Any) -> Plan | str:
    plan = plan_of(module, module)
    if isinstance(plan, str) or module.training:
        return plan
    if any(child.training and original_name(child) not in _WITHOUT_A_MODE for child in module.modules()):
        return "some of its layers are in training mode"
    return plan


_plans: Derived[Plan | str, Any] = Derived(_plan_now, settings=lambda module: module._vk_settings(module), below=("training", "eps", "num_groups"))


# --- what the zoos' layers are -------------------------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "timm.layers.activations.Swish": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.GELU": "gelu",
    "timm.layers.activations.GELU": "gelu",
    "transformers.activations.GELUActivation": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
}
CONV_LAYERS = frozenset(
    f"transformers.models.{name}ConvLayer" for name in ("mobilevit.modeling_mobilevit.MobileViT", "mobilevitv2.modeling_mobilevitv2.MobileViTV2")
)
_INACTIVE = frozenset(
    {
        *("torch.nn.modules.linear.Identity", "torch.nn.modules.dropout.Dropout", "timm.layers.drop.DropPath"),
        "transformers.models.dinov2.modeling_dinov2.Dinov2DropPath",
    }
)
"""What changes nothing in evaluation."""
_WITHOUT_A_MODE = frozenset({"einops.layers.torch.Rearrange", "einops.layers.torch.Reduce"})
"""What is the same in training: einops makes these anew when a model is copied or unpickled, and a new layer says that it is in training."""


def activation_of(module: Any) -> str:
    """The name of an activation."""
    if module is None:
        return "none"
    name = original_name(module)
    if name not in _ACTIVATIONS:
        raise UnfitError(f"its activation is a {type(module).__name__}")
    act = getattr(module, "act", None)  # transformers': what it calls
    if isinstance(act, partial):
        as_named = act.func is nn.functional.gelu and act.keywords == {"approximate": "tanh"}
    else:
        as_named = act is None or act is nn.functional.gelu
    if not as_named:
        raise UnfitError("its GELU is written in Python")
    return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else _ACTIVATIONS[name]


def no_change(*modules: Any) -> None:
    """Whether these layers change nothing in evaluation.

    Raises:
        UnfitError: one may.
    """
    for module in modules:
        if module is not None and original_name(module) not in _INACTIVE:
            raise UnfitError(f"it has a {type(module).__name__} in between")


def plain(module: Any, kind: type[Module]) -> Module:
    """``module``, of this very class.

    Raises:
        UnfitError: it is of another.
    """
    if original_class(module) is not kind:
        raise UnfitError(f"a {type(module).__name__} stands where a plain {kind.__name__} should")
    return module


def batch_norm(module: Any) -> nn.BatchNorm2d:
    """``module``, if it can be folded.

    Raises:
        UnfitError: it cannot.
    """
    if module.weight is None or module.bias is None or module.running_mean is None or module.running_var is None or not module.track_running_stats:
        raise UnfitError("a BatchNorm has no weight or no running statistics")
    return module


def conv_layer(module: Any) -> Layer:
    """A convolution with its norm and activation, as timm and transformers write one."""
    name = original_name(module)
    if name == "timm.layers.conv_bn_act.ConvNormAct":
        conv, norm = plain(module.conv, nn.Conv2d), module.bn
        no_change(module._modules.get("aa"))
        if original_name(norm) != "timm.layers.norm_act.BatchNormAct2d":
            raise UnfitError(f"its norm is a {type(norm).__name__}")
        no_change(norm.drop)
        return Layer(conv, batch_norm(norm), activation=activation_of(norm.act))
    if name in CONV_LAYERS:
        norm = module.normalization
        if norm is not None and type(norm) is not nn.BatchNorm2d:
            raise UnfitError(f"its norm is a {type(norm).__name__}")
        return Layer(plain(module.convolution, nn.Conv2d), None if norm is None else batch_norm(norm), activation=activation_of(module.activation))
    return Layer(plain(module, nn.Conv2d))


def conv_sequence(module: Any) -> list[Layer]:
    """Convolutions one after the other, each with its norm and perhaps an activation, as vit_pytorch writes them.

    Raises:
        UnfitError: it is another sequence.
    """
    layers: list[Layer] = []
    rest = list(plain(module, nn.Sequential))
    while rest:
        if len(rest) < 2:
            raise UnfitError("a convolution has no norm behind it")
        conv, norm, *rest = rest
        activation = activation_of(rest.pop(0)) if rest and type(rest[0]) is not nn.Conv2d else "none"
        layers.append(Layer(plain(conv, nn.Conv2d), batch_norm(plain(norm, nn.BatchNorm2d)), activation=activation))
    return layers


# --- MLPs ----------------------------------------------------------------------------------------------------------------------------


class Linears(Folded):
    """Base of what is made of linear layers, and the original where these are left to PyTorch."""

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return super()._vk_why_not(module, role) or left_to_pytorch(cls._vk_weight(module).dtype)


def of_linears(bind: Callable[[torch.dtype], Run | str]) -> Plan:
    """The plan of what is made of linear layers: ``bind`` is asked for dtypes alone in which these are not left to PyTorch."""
    return Plan(lambda dtype: left_to_pytorch(dtype) or bind(dtype))


class Mlp(Linears):
    """timm's ``Mlp``, and the ``FeedForward`` of vit_pytorch, whose norm is inside: in one op, the hidden tokens never leave the cache."""

    _vk_dims: ClassVar[range] = range(2, 9)

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        whole = mlp_layers(module)

        def bind(dtype: torch.dtype) -> Run:
            run, channels = whole.bind(dtype), whole.channels

            def on_tokens(x: Tensor) -> Tensor | None:
                if x.shape[-1] != channels:
                    return None
                # The tokens are the pixels of one row of a map in channels_last.
                y = run(x.flatten(0, -2).T[None, :, None])
                return y[0, :, 0].T.unflatten(0, x.shape[:-1])

            return on_tokens

        return of_linears(bind)


def left_to_pytorch(dtype: torch.dtype) -> str | None:
    """Why linear layers of this dtype are left to PyTorch: made in float32 they have half the speed of oneDNN's in 16 bits, where it has such."""
    ours = dtype is torch.float32 or (dtype is torch.bfloat16 and bfloat16_products()) or (dtype in _16_BITS and not onednn(dtype))
    return None if ours else f"linear layers in {dtype} are left to PyTorch"


_16_BITS = (torch.bfloat16, torch.float16)


def mlp_layers(module: Any, norm: Any = None, scale: Tensor | None = None) -> Bottleneck:
    """The pass of a zoo's MLP: with ``norm`` in front, if it has none inside, and ``scale`` behind.

    Raises:
        UnfitError: it is another MLP.
    """
    if original_name(module) == "timm.layers.mlp.Mlp":
        first, activation, second = module.fc1, module.act, module.fc2
        no_change(module.drop1, module.norm, module.drop2)
    elif original_name(module) in (f"{name}MLP" for name in TRANSFORMERS_VITS):
        first, activation, second = module.fc1, module.activation_fn, module.fc2
    elif original_name(module).startswith("vit_pytorch."):
        layers = [layer for layer in plain(module.net, nn.Sequential) if type(layer) is not nn.Dropout]
        if len(layers) != 4:
            raise UnfitError("it is not a LayerNorm, two linear layers and an activation")
        norm, first, activation, second = layers
    else:
        raise UnfitError(f"its MLP is a {type(module).__name__}")
    expand, project = Layer(plain(first, nn.Linear), activation=activation_of(activation)), Layer(plain(second, nn.Linear), scale=scale)
    return bottleneck(project, expand=expand, norm=None if norm is None else token_norm(norm))


def token_norm(module: Any) -> nn.LayerNorm:
    """A LayerNorm over the channels.

    Raises:
        UnfitError: it is another norm.
    """
    if original_name(module) not in _LAYER_NORMS:
        raise UnfitError(f"its norm is a {type(module).__name__}")
    if not is_token_norm(module):
        raise UnfitError("its LayerNorm is over more than the channels")
    return module


def is_token_norm(module: Any) -> bool:
    """Whether it is a LayerNorm over the channels."""
    return original_name(module) in _LAYER_NORMS and len(module.normalized_shape) == 1


_LAYER_NORMS = frozenset({"torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNormFp32"})
TRANSFORMERS_VITS = {
    f"transformers.models.{name}": layer
    for name, layer in {
        "vit.modeling_vit.ViT": "Layer",
        "deit.modeling_deit.DeiT": "Layer",
        "dinov2.modeling_dinov2.Dinov2": "Layer",
        "clip.modeling_clip.CLIP": "EncoderLayer",
        "siglip.modeling_siglip.Siglip": "EncoderLayer",
    }.items()
}
"""What the names of the classes of transformers' plain ViTs begin with, and what that of a layer ends with."""


TABLE: dict[str, type[Fused]] = {
    "timm.layers.mlp.Mlp": Mlp,
    **{f"vit_pytorch.{name}.FeedForward": Mlp for name in ("vit", "simple_vit", "deepvit", "mobile_vit")},
}
