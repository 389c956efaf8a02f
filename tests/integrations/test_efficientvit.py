"""timm's EfficientViT, original against accelerated: outputs, gradients, running statistics; and the folded weights, which must never be stale."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vitkernels
from vitkernels.nn import _cascade
from vitkernels.nn._derived import Derived

from .. import zoo
from ..zoo import reasons

pytestmark = pytest.mark.usefixtures("poison")
ROUTES: dict[str, dict[str, str]] = {"all": {}, "attention only": {"only": "CascadedGroupAttention"}}
MEASURES: dict[str, tuple[zoo.Measure, bool]] = {"inference": (zoo.inference, False), "eval": (zoo.results, False), "train": (zoo.results, True)}


def pair(model: nn.Module, images: Tensor, **options: Any) -> tuple[nn.Module, nn.Module, vitkernels.Handle]:
    original = zoo.settle(model, images).eval()
    accelerated = copy.deepcopy(original)
    return original, accelerated, vitkernels.accelerate(accelerated, **options)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 32, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def attention(x: Tensor) -> nn.Module:
    """A ``LocalWindowAttention`` in evaluation, whose windows of 4 do not divide its map of 10."""
    return zoo.settle(zoo.timm_window_attention(), x).eval()


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every folding of weights."""
    calls: list[int] = []
    fold = _cascade.folded
    monkeypatch.setattr(_cascade, "folded", lambda *arguments: calls.append(1) or fold(*arguments))
    return calls


def assert_infers_the_same(original: nn.Module, accelerated: nn.Module, images: Tensor) -> None:
    zoo.assert_same(original, accelerated, images, training=False, measure=zoo.inference)


# --- outputs, gradients, statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"efficientvit_m{i}" for i in range(6)])
def test_model_in_evaluation(name: str) -> None:
    images = zoo.photos(224)
    original, accelerated, handle = pair(zoo.timm_efficientvit(name), images)
    blocks, chains = 8 if name == "efficientvit_m5" else 6, 5
    assert len(handle.replaced) == 2 * blocks + chains and not handle.skipped
    zoo.assert_same(original, accelerated, images, training=False, jitters=2)
    assert_infers_the_same(original, accelerated, images)
    assert not handle.fallbacks


@pytest.mark.parametrize(
    ("name", "size"), [("efficientvit_m0", 256), ("efficientvit_m1", 384), ("efficientvit_m0", 512), ("efficientvit_m2", (256, 320))]
)
def test_maps_that_windows_do_not_divide(name: str, size: int | tuple[int, int]) -> None:
    images = zoo.photos(size, 1)
    original, accelerated, handle = pair(zoo.timm_efficientvit(name), zoo.photos(size))
    assert_infers_the_same(original, accelerated, images)
    assert not handle.fallbacks


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m1"])  # all kernels of 5, and of 7, 5, 3 and 3: what the others are made of, too
def test_three_training_steps(name: str) -> None:
    """In float64. In float32 every run of a whole model, the original's too, has a ReLU among millions on the other side of zero, and differs from
    the next by as much as that ReLU counts, which is a lot in a squeeze-and-excitation; float32 is held to the rule in smaller models below.
    Float64 has no better truth: what a sum rounds to, a random walk of as many steps as it has terms, is what the original's weights are moved by.
    """
    images = zoo.photos(128, 3)
    original, accelerated, handle = pair(zoo.timm_efficientvit(name, img_size=128), images)
    original, accelerated, images = original.double(), accelerated.double(), images.double()
    eps = images.numel() ** 0.5 * torch.finfo(images.dtype).eps
    zoo.assert_same(original, accelerated, images, training=True, measure=zoo.trained, jitters=2, eps=eps)
    assert not handle.fallbacks


@pytest.mark.parametrize("measure", MEASURES)
def test_small_model(measure: str) -> None:
    images = zoo.photos(128, 3)
    original, accelerated, handle = pair(zoo.small_efficientvit(), images)
    function, training = MEASURES[measure]
    zoo.assert_same(original, accelerated, images, training=training, measure=function)
    assert not handle.fallbacks


@pytest.mark.parametrize("momentum", [0.1, 1.0, None, "mixed"], ids=str)
def test_running_statistics(attention: nn.Module, x: Tensor, momentum: float | str | None) -> None:
    norms = [module for module in attention.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.momentum = (0.3, None, 0.01)[i % 3] if momentum == "mixed" else momentum
    accelerated = copy.deepcopy(attention)
    handle = vitkernels.accelerate(accelerated)
    zoo.assert_same(attention, accelerated, x, training=True, measure=zoo.trained)
    before = copy.deepcopy(accelerated.state_dict())
    accelerated.train()(x + 1)
    changed = [key for key, value in accelerated.state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) == 3 * len(norms) and not handle.fallbacks


def test_statistics_are_those_of_a_forward_without_gradients_too(attention: nn.Module, x: Tensor) -> None:
    accelerated = copy.deepcopy(attention)
    vitkernels.accelerate(accelerated)

    def measure(model: nn.Module, images: Tensor, *, training: bool) -> dict[str, Tensor]:
        return {**zoo.inference(model, images * 2 + 1, training=training), **dict(model.named_buffers())}

    zoo.assert_same(attention, accelerated, x, training=True, measure=measure)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("measure", MEASURES)
def test_window_attention(x: Tensor, measure: str, layout: torch.memory_format, route: str) -> None:
    x = x.to(memory_format=layout)
    original, accelerated, handle = pair(zoo.timm_window_attention(), x, **ROUTES[route])
    function, training = MEASURES[measure]
    zoo.assert_same(original, accelerated, x, training=training, measure=function)
    assert not handle.fallbacks


@pytest.mark.parametrize("options", [{"heads": 1, "kernels": (3,)}, {"heads": 4, "kernels": (3, 5, 7, 3)}, {"key_dim": 8}, {"window": 10}], ids=str)
@pytest.mark.parametrize("measure", MEASURES)
def test_other_heads_and_windows(x: Tensor, options: dict[str, Any], measure: str) -> None:
    original, accelerated, handle = pair(zoo.timm_window_attention(**options), x)
    function, training = MEASURES[measure]
    zoo.assert_same(original, accelerated, x, training=training, measure=function)
    assert not handle.fallbacks


def test_gradient_of_the_input_of_frozen_weights(attention: nn.Module, x: Tensor, folds: list[int]) -> None:
    """Nothing of the weights is wanted, so the kept ones serve, also those first made in inference mode."""
    accelerated = copy.deepcopy(attention).requires_grad_(False)
    vitkernels.accelerate(accelerated)
    with torch.inference_mode():
        accelerated(x)
    for model in (attention, accelerated):
        model.requires_grad_(False)

    def measure(model: nn.Module, images: Tensor, **_: Any) -> dict[str, Tensor]:
        images = images.clone().requires_grad_()
        y = model.eval()(images)
        return {"output": y.detach(), "grad x": torch.autograd.grad(y.square().sum(), images)[0]}

    zoo.assert_same(attention, accelerated, x, training=False, measure=measure)
    assert len(folds) == 2  # of the model, and of its copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("measure", ["inference", "eval"])
def test_low_precision(x: Tensor, attention: nn.Module, dtype: torch.dtype, measure: str) -> None:
    accelerated = copy.deepcopy(attention)
    handle = vitkernels.accelerate(accelerated)
    zoo.assert_same(attention.to(dtype), accelerated.to(dtype), x.to(dtype), training=False, measure=MEASURES[measure][0])
    assert not handle.fallbacks


def test_norms_kept_in_float32(x: Tensor, attention: nn.Module) -> None:
    accelerated = copy.deepcopy(attention)
    handle = vitkernels.accelerate(accelerated)
    for model in (attention, accelerated):
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    assert_infers_the_same(attention, accelerated, x.bfloat16())
    assert not handle.fallbacks


@pytest.mark.parametrize("measure", MEASURES)
def test_autocast(x: Tensor, attention: nn.Module, measure: str) -> None:
    function, training = MEASURES[measure]

    def autocast(model: nn.Module, images: Tensor, *, training: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=images.dtype is torch.float32):
            return function(model, images, training=training)

    accelerated = copy.deepcopy(attention)
    handle = vitkernels.accelerate(accelerated)
    eager, fast = (autocast(copy.deepcopy(model), x, training=training) for model in (attention, accelerated))
    assert {name: tensor.dtype for name, tensor in fast.items()} == {name: tensor.dtype for name, tensor in eager.items()}
    zoo.assert_same(attention, accelerated, x, training=training, measure=autocast, eps=torch.finfo(torch.bfloat16).eps)
    assert not handle.fallbacks


def test_folded_weights_of_each_dtype(x: Tensor, attention: nn.Module) -> None:
    """A module that is called in float32, under autocast, and in another dtype takes each time the weights folded for that."""
    vitkernels.accelerate(attention)

    def outputs(model: nn.Module) -> list[Tensor]:
        found = [model(x)]
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(x))
        return [*found, model(x)]

    with torch.no_grad():
        for _ in range(2):
            kept, bf16, again = outputs(attention)
            assert torch.equal(kept, again) and bf16.dtype is torch.bfloat16
            assert torch.equal(kept, copy.deepcopy(attention)(x))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(bf16, copy.deepcopy(attention)(x))
        half = attention.bfloat16()(x.bfloat16())
        assert torch.equal(half, copy.deepcopy(attention)(x.bfloat16()))
        wide = attention.double()(x.double())
        assert torch.equal(wide, copy.deepcopy(attention)(x.double()))


def test_frozen_norms_in_a_training_model(x: Tensor) -> None:
    def freeze(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def measure(model: nn.Module, images: Tensor, *, training: bool) -> dict[str, Tensor]:
        train = model.train
        model.train = lambda mode=True: (train(mode), freeze(model), model)[2]  # type: ignore[method-assign]
        return zoo.trained(model, images, training=training)

    original, accelerated, handle = pair(zoo.timm_window_attention(), x)
    before = dict(original.named_buffers())
    zoo.assert_same(original, accelerated, x, training=True, measure=measure)
    after = measure(copy.deepcopy(accelerated), x, training=True)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name in after)
    assert not handle.fallbacks


def test_reparameterised_model() -> None:
    from timm.utils import reparameterize_model

    images = zoo.photos(128)
    model = reparameterize_model(zoo.settle(zoo.small_efficientvit(), images).eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    accelerated = copy.deepcopy(model)
    handle = vitkernels.accelerate(accelerated)
    assert len(handle.replaced) == 6 + 5
    for function, training in MEASURES.values():
        zoo.assert_same(model, accelerated, images, training=training, measure=function)
    assert not handle.fallbacks


def test_reparameterised_later() -> None:
    from timm.utils import reparameterize_model

    images = zoo.photos(128)
    original, accelerated, handle = pair(zoo.small_efficientvit(), images)
    with torch.no_grad():
        accelerated(images)
    accelerated = reparameterize_model(accelerated, inplace=True)
    assert_infers_the_same(original, accelerated, images)
    assert not handle.fallbacks


# --- left alone --------------------------------------------------------------------------------------------------------------------


def test_sync_batch_norm_is_left_alone_and_reported(x: Tensor, attention: nn.Module) -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(attention)
    expected = converted(x)
    assert reasons(vitkernels.accelerate(converted)) == {
        "": "its attn is not replaced",
        "attn": "qkvs.0.bn is a SyncBatchNorm, not a plain BatchNorm2d",
    }
    assert torch.equal(converted(x), expected)


def test_sync_batch_norm_later_runs_the_original(x: Tensor, attention: nn.Module) -> None:
    expected = attention(x)
    handle = vitkernels.accelerate(attention)
    attention(x)
    assert not handle.fallbacks
    assert torch.equal(nn.SyncBatchNorm.convert_sync_batchnorm(attention)(x), expected)
    assert "SyncBatchNorm" in handle.fallbacks["attn"]


def _one_in_training(attention: Any) -> None:
    attention.attn.dws[1].bn.train()


def _double() -> nn.Module:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    return Double()


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook on a norm": (lambda m: m.attn.dws[1].bn.register_forward_hook(lambda *_: None), "dws.1.bn has a hook"),
    "hook on a layer": (lambda m: m.attn.qkvs[0].register_forward_pre_hook(lambda *_: None), "qkvs.0 has a hook"),
    "parametrized": (lambda m: parametrize.register_parametrization(m.attn.proj[1].conv, "weight", _double()), "proj.1.conv is a Parametrized"),
    "patched": (lambda m: setattr(m.attn.dws[0].conv, "forward", lambda x: x), "dws.0.conv has a hook (or a forward of its own)"),
    "no statistics": (lambda m: setattr(m.attn.qkvs[1], "bn", nn.BatchNorm2d(48, track_running_stats=False)), "does not track running statistics"),
    "statistics off": (lambda m: setattr(m.attn.qkvs[1].bn, "track_running_stats", False), "does not track running statistics"),
    "no affine": (lambda m: setattr(m.attn.qkvs[1], "bn", nn.BatchNorm2d(48, affine=False).eval()), "has no weight or no bias"),
    "another eps": (lambda m: setattr(m.attn.qkvs[1].bn, "eps", 0.1), "different eps"),
    "another activation": (lambda m: m.attn.proj.__setitem__(0, nn.GELU()), "proj.0 is a GELU"),
    "another stride": (lambda m: setattr(m.attn.dws[0].conv, "padding_mode", "circular"), "dws.0 is not a depthwise convolution"),
    "half folded": (lambda m: m.attn.dws.__setitem__(0, m.attn.dws[0].fuse()), "some of its norms are folded"),
}


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layer_is_honoured(x: Tensor, attention: nn.Module, change: str, later: bool) -> None:
    apply, words = CHANGES[change]
    torch.manual_seed(0)
    if later:
        handle = vitkernels.accelerate(attention)
        with torch.no_grad():
            attention(x)
        assert not handle.fallbacks
    apply(attention)
    if not later:
        handle = vitkernels.accelerate(attention)
    with torch.no_grad():
        ours = attention(x)
    assert words in (handle.fallbacks if later else reasons(handle))["attn"]
    handle.remove()
    with torch.no_grad():
        assert torch.equal(ours, attention(x))


def test_some_norms_in_training(x: Tensor, attention: nn.Module) -> None:
    attention.attn.dws[1].bn.train()
    accelerated = copy.deepcopy(attention)
    handle = vitkernels.accelerate(accelerated)
    assert len(handle.replaced) == 2
    assert torch.equal(accelerated(x), attention(x))
    assert handle.fallbacks == {"attn": "some of its norms are in training mode, some are not"}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(accelerated.buffers(), attention.buffers(), strict=True))


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_hook_on_the_attention_sees_windows(x: Tensor, attention: nn.Module, later: bool) -> None:
    seen: list[tuple[int, ...]] = []

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(tuple(arguments[0].shape))

    expected = attention(x)
    if later:
        handle = vitkernels.accelerate(attention)
    attention.attn.register_forward_pre_hook(hook)
    if not later:
        handle = vitkernels.accelerate(attention)
    torch.testing.assert_close(attention(x), expected)
    assert seen == [(2 * 9, 32, 4, 4)]
    assert "has a hook" in handle.fallbacks[""] and "attn" not in handle.fallbacks  # the attention itself still runs as one op


def test_map_smaller_than_the_window(attention: nn.Module) -> None:
    """The original fills it up to one window, which the attention then takes."""
    accelerated = copy.deepcopy(attention)
    handle = vitkernels.accelerate(accelerated)
    assert_infers_the_same(attention, accelerated, torch.randn(2, 32, 3, 9))
    accelerated.attn(torch.randn(2, 32, 4, 4))
    assert not handle.fallbacks
    accelerated(torch.randn(2, 32, 3, 9))
    assert handle.fallbacks == {"attn": "the map is 3 x 9, the window 4 x 4"}


@pytest.mark.parametrize("shape", [(2, 48, 10, 10), (32, 10, 10), (2, 32, 10)], ids=str)
def test_wrong_input_fails_as_it_did(attention: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with pytest.raises(Exception) as theirs:
        attention(x)
    vitkernels.accelerate(attention)
    with pytest.raises(type(theirs.value)) as ours:
        attention(x)
    assert str(ours.value) == str(theirs.value)


def test_mixed_dtypes_fail_as_they_did(attention: nn.Module, x: Tensor) -> None:
    with pytest.raises(RuntimeError) as theirs:
        attention(x.double())
    vitkernels.accelerate(attention)
    with torch.no_grad():
        attention(x)  # folded weights are kept, and of another dtype than the next input
        with pytest.raises(RuntimeError) as ours:
            attention(x.double())
    assert str(ours.value) == str(theirs.value)


def test_training_without_a_kernel_runs_the_original(x: Tensor, attention: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where automatic choice would end in the reference, the original code is as good, and has its own gradients."""
    accelerated = copy.deepcopy(attention).train()
    handle = vitkernels.accelerate(accelerated)
    monkeypatch.setattr(_cascade.backends, "select", lambda *_: "reference")
    with vitkernels.backend("auto"):
        assert torch.equal(accelerated(x), attention.train()(x))
    assert "no kernel" in handle.fallbacks["attn"]


# --- the folded weights are kept, and are never stale ------------------------------------------------------------------------------


def test_folded_once(x: Tensor, attention: nn.Module, folds: list[int]) -> None:
    vitkernels.accelerate(attention)
    with torch.no_grad():
        first = attention(x)
        for _ in range(3):
            assert torch.equal(attention(x), first)
    assert len(folds) == 1
    attention(x)  # with gradients, folded anew
    assert len(folds) == 2


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.5 if value.is_floating_point() else value for name, value in model.state_dict().items()})


def _load_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        _load(model)


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _train(model: nn.Module) -> None:
    with torch.no_grad():
        model.train()(torch.randn(2, 32, 10, 10, generator=torch.Generator().manual_seed(5)) * 3 + 1)
    model.eval()


def _data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def _round(model: Any) -> None:
    """As ``model.bfloat16().float()`` does: neither identity, version nor dtype is another afterwards."""
    table = model.attn.attention_biases
    table.data = table.data.bfloat16()
    table.data = table.data.float()


def _written_behind_the_back(model: nn.Module) -> None:
    """As some optimizers write: no version is counted. But they write after a backward, so after a forward with gradients."""
    model.train().eval()  # timm keeps the gathered bias, with the graph it was gathered in
    model(torch.zeros(1, 32, 10, 10)).sum().backward()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def _one_buffer(model: Any) -> None:
    model.attn.qkvs[1].bn.running_var.mul_(2)


def _other_module(model: Any) -> None:
    torch.manual_seed(7)
    model.attn.qkvs[0] = type(model.attn.qkvs[0])(16, 48).eval()


def _other_scale(model: Any) -> None:
    model.attn.scale *= 2


def _other_eps(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.3


WRITES = [
    _load, _load_in_inference_mode, _step, _train, _data, _round, _written_behind_the_back, _one_buffer, _other_module, _other_scale, _other_eps
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda function: function.__name__.strip("_"))
def test_never_stale(x: Tensor, attention: nn.Module, write: Callable[[nn.Module], None]) -> None:
    original, accelerated = attention, copy.deepcopy(attention)
    vitkernels.accelerate(accelerated)
    with torch.no_grad():
        before = accelerated(x)
        kept = accelerated(x)
    write(accelerated)
    write(original)
    original.train().eval()  # timm keeps the gathered bias
    with torch.no_grad():
        after = accelerated(x)
        assert torch.equal(before, kept) and not torch.allclose(after, before, rtol=1e-4)
        assert torch.equal(after, copy.deepcopy(accelerated)(x))  # for a copy nothing is kept
    assert_infers_the_same(original, accelerated, x)


def test_bias_after_load_state_dict_is_right_where_timm_is_stale(x: Tensor, attention: nn.Module) -> None:
    other = copy.deepcopy(attention)
    with torch.no_grad():
        other.attn.attention_biases.mul_(-3)
    timm, ours = copy.deepcopy(attention), copy.deepcopy(attention)
    vitkernels.accelerate(ours)
    outputs = []
    with torch.no_grad():
        for model in (timm, ours):
            model(x)
            model.load_state_dict(other.state_dict())
            outputs.append(model(x))
        fresh = zoo.timm_window_attention().eval()
        fresh.load_state_dict(other.state_dict())
        accelerated = copy.deepcopy(fresh)
        vitkernels.accelerate(accelerated)
        assert not torch.allclose(outputs[0], fresh(x)), "timm no longer keeps a stale bias: the note about it can go"
        assert torch.equal(outputs[1], accelerated(x))
    assert_infers_the_same(fresh, ours, x)


def test_weights_made_in_inference_mode(x: Tensor) -> None:
    """They count no versions, so nothing made from them is kept."""
    with torch.inference_mode():
        model = zoo.timm_window_attention().eval()
        vitkernels.accelerate(model)
        first = model(x)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        second = model(x)
        twin = copy.deepcopy(model)
        assert not torch.allclose(first, second) and torch.equal(twin(x), second)


def test_weights_in_shared_memory_are_not_kept(x: Tensor, attention: nn.Module, folds: list[int]) -> None:
    """Another process may write them."""
    vitkernels.accelerate(attention.share_memory())
    with torch.no_grad():
        attention(x), attention(x)
    assert len(folds) == 2


def test_nothing_is_kept_beside_process_groups(x: Tensor, attention: nn.Module, folds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP gathers the weights anew into the same parameters, and counts no version."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    vitkernels.accelerate(attention)
    with torch.no_grad():
        attention(x), attention(x)
    assert len(folds) == 2


def test_nothing_is_kept_in_the_module(x: Tensor) -> None:
    attention = zoo.settle(zoo.timm_window_attention(), x).eval()
    fresh = copy.deepcopy(attention)
    state, size = list(attention.state_dict()), len(pickle.dumps(attention))
    vitkernels.accelerate(attention)
    unused = len(pickle.dumps(attention))
    with torch.no_grad():
        attention(x)
    assert list(attention.state_dict()) == state and len(pickle.dumps(attention)) == unused < size + 500
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        with torch.no_grad():
            assert torch.equal(twin(x), attention(x))
            for parameter in twin.parameters():
                parameter.mul_(0.5)
            for parameter in fresh.parameters():
                parameter.mul_(0.5)
        assert_infers_the_same(fresh, twin, x)
        fresh.load_state_dict(attention.state_dict())
    kept = weakref.ref(_cascade._plans.entry(attention.attn))
    assert kept() is not None
    del attention, twin
    gc.collect()
    assert kept() is None


def test_remove_is_exact(x: Tensor, attention: nn.Module) -> None:
    before = {path: (type(module), set(vars(module))) for path, module in attention.named_modules()}
    expected = attention(x)
    handle = vitkernels.accelerate(attention)
    with torch.no_grad():
        attention(x)
    kept = weakref.ref(_cascade._plans.entry(attention.attn))
    handle.remove()
    assert {path: (type(module), set(vars(module))) for path, module in attention.named_modules()} == before
    assert torch.equal(attention(x), expected) and kept() is None


# --- compilers and transforms ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("measure", MEASURES)
def test_compile_in_one_graph(measure: str) -> None:
    images = zoo.photos(128)
    original, compiled, handle = pair(zoo.small_efficientvit(), images)
    compiled.compile(fullgraph=True, backend="aot_eager")
    function, training = MEASURES[measure]
    zoo.assert_same(original, compiled, images, training=training, measure=function)
    assert not handle.fallbacks


@pytest.mark.usefixtures("dynamo")
def test_compiled_graph_sees_new_weights(x: Tensor, attention: nn.Module) -> None:
    original, compiled = copy.deepcopy(attention), attention
    vitkernels.accelerate(compiled)
    compiled.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    for model in (original, compiled):
        _load(model)
    assert_infers_the_same(original.train().eval(), compiled, x)


@pytest.mark.parametrize("strict", [False, True])
def test_export_gives_the_original_graph(x: Tensor, attention: nn.Module, strict: bool) -> None:
    expected = attention(x)
    vitkernels.accelerate(attention)
    attention(x)
    program = torch.export.export(attention, (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("batch_norm" in target for target in targets) and not [target for target in targets if "vitkernels" in target]
    torch.testing.assert_close(program.module()(x), expected)


def test_trace_gives_the_original_graph(x: Tensor, attention: nn.Module) -> None:
    expected = attention(x)
    vitkernels.accelerate(attention)
    with torch.no_grad():
        traced = torch.jit.trace(attention, x, check_trace=False)
    assert "vitkernels" not in str(traced.inlined_graph) and "batch_norm" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected)


def test_functional_transforms(x: Tensor, attention: nn.Module) -> None:
    def derivatives() -> list[Tensor]:
        attention.train().eval()  # timm keeps the gathered bias, with the graph it was gathered in
        parameters = dict(attention.named_parameters())
        gradients = torch.func.grad(lambda p: torch.func.functional_call(attention, p, (x,)).square().sum())(parameters)
        return list(gradients.values())

    expected = derivatives()
    handle = vitkernels.accelerate(attention)
    with torch.no_grad():
        attention(x)
    for ours, theirs in zip(derivatives(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert "torch.func" in handle.fallbacks["attn"]


def test_functional_call_uses_the_weights_it_is_given(x: Tensor, attention: nn.Module) -> None:
    other = copy.deepcopy(attention)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    vitkernels.accelerate(attention)
    with torch.no_grad():
        own = attention(x)
        ours = torch.func.functional_call(attention, dict(other.named_parameters()), (x,))
        torch.testing.assert_close(ours, other.train().eval()(x))
        assert torch.equal(attention(x), own)


def test_activation_checkpointing(x: Tensor) -> None:
    from torch.utils.checkpoint import checkpoint

    def measure(model: nn.Module, images: Tensor, *, training: bool) -> dict[str, Tensor]:
        """Norms count the batch twice, as timm's do: once more when the forward is run again."""
        model.train(training)
        checkpoint(lambda images: model(images).square(), images, use_reentrant=False).sum().backward()
        return {**{f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}, **dict(model.named_buffers())}

    original, accelerated, _ = pair(zoo.timm_window_attention(), x)
    zoo.assert_same(original, accelerated, x, training=True, measure=measure)


def test_other_threads_may_call(x: Tensor, attention: nn.Module) -> None:
    from concurrent.futures import ThreadPoolExecutor

    vitkernels.accelerate(attention)
    with torch.no_grad():
        expected = attention(x)

    def call(_: int) -> Tensor:
        with torch.no_grad():
            attention.attn.attention_biases.mul_(1)  # the same values, another version
            return attention(x)

    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(call, range(32)):
            assert torch.equal(y, expected)


def test_values_made_while_another_thread_writes() -> None:
    """The other thread's write and call fall between making a value and keeping it; here one inside of the other, to be so every time."""
    norm = nn.BatchNorm1d(3)
    entry = Derived(lambda module: None, lambda module: None).entry(norm)

    def make() -> float:
        before = norm.weight[0].item()
        if before == 1:
            norm.weight.fill_(2)
            assert entry.value("key", make) == 2
        return before

    assert entry.value("key", make) == 1
    assert entry.value("key", make) == 2, "a value of the old weights was kept for the new ones"
