"""The contract of ``accelerate`` and its handle: what is reported, what is reverted, and what a swapped class must survive."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import vitkernels
from vitkernels import backends
from vitkernels.accuracy import compare_tensors
from vitkernels.integrations import Record

from .. import zoo
from ..zoo import reasons

pytestmark = pytest.mark.usefixtures("attention_alone")

ATTENTION = "transformer.0.attn"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def block(x: Tensor) -> nn.Module:
    return zoo.settle(zoo.timm_block(), x).eval()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a module is: class, and the identity of everything in its ``__dict__``, containers looked into."""

    def contents(value: Any) -> Any:
        return {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)

    return {path: (type(m), {k: contents(v) for k, v in vars(m).items() if k != "training"}) for path, m in model.named_modules()}


# --- report ------------------------------------------------------------------------------------------------------------------------


def test_records_and_table(block: nn.Module) -> None:
    handle = vitkernels.accelerate(block)
    chosen = backends.select("separable_self_attention", block.conv_1x1.weight)
    assert handle.replaced[2] == Record(ATTENTION, "timm.models.mobilevit.LinearSelfAttention", "separable_self_attention", backend=chosen)
    assert [r.path for r in handle.replaced] == ["", "transformer.0", ATTENTION, "transformer.1", "transformer.1.attn"]
    table = str(handle)
    assert table.startswith("vitkernels.accelerate: replaced 5 of the 5 modules it knows")
    for record in handle.replaced:
        line = next(line for line in table.splitlines() if line.startswith((record.path or "(the model)") + " "))
        assert record.original_class.rpartition(".")[2] in line and chosen in line


def test_nothing_to_replace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    handle = vitkernels.accelerate(model)
    assert not handle.replaced and not handle.skipped
    assert "nothing to replace" in str(handle)
    handle.remove()


def test_dry_run_changes_nothing(block: nn.Module) -> None:
    before = snapshot(block)
    handle = vitkernels.accelerate(block, dry_run=True)
    assert snapshot(block) == before
    assert len(handle.replaced) == 5 and "would replace 5" in str(handle)
    assert handle.replaced == vitkernels.accelerate(block).replaced


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({"only": "separable_self_attention"}, 5),
        ({"only": "LinearSelfAttention"}, 2),
        ({"only": "timm.models.mobilevit.LinearSelfAttention"}, 2),
        ({"only": "transformer.1*"}, 2),
        ({"only": ["LinearSelfAttention", "transformer.1"]}, 3),
        ({"skip": "separable_self_attention"}, 0),
        ({"skip": ("MobileVitV2Block",)}, 4),
        ({"skip": ATTENTION}, 2),  # without its attention neither the layer nor the block
        ({"only": "transformer.*", "skip": "transformer.1.*"}, 2),
        ({"only": []}, 0),
    ],
    ids=str,
)
def test_only_and_skip(block: nn.Module, x: Tensor, options: dict[str, Any], replaced: int) -> None:
    original = copy.deepcopy(block)
    handle = vitkernels.accelerate(block, **options)
    assert len(handle.replaced) == replaced and len(handle.skipped) == 5 - replaced
    assert all(record.reason for record in handle.skipped)
    zoo.assert_same(original, block, x, training=False)


def test_reasons_name_the_cause(block: nn.Module) -> None:
    assert reasons(vitkernels.accelerate(block, skip=ATTENTION)) == {
        "": "a transformer layer (LinearTransformerBlock) is not replaced",
        "transformer.0": "its attn is not replaced",
        ATTENTION: "named in skip",
    }


def test_pattern_that_matches_nothing_is_noted(block: nn.Module) -> None:
    assert "only='LinearSelfAttn' matches none" in str(vitkernels.accelerate(block, only="LinearSelfAttn"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(({},), "model"), ((nn.ReLU(), 3), "only"), ((nn.ReLU(), [3]), "only"), ((nn.ReLU(), None, 3), "skip"), ((nn.ReLU(), None, None, 1), "dry_run")],
    ids=["model", "only", "only's item", "skip", "dry_run"],
)
def test_wrong_types(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(TypeError, match=f"^accelerate: {word} "):
        vitkernels.accelerate(*arguments)


def test_backend_that_cannot_run_changes_nothing(block: nn.Module) -> None:
    before = snapshot(block)
    with vitkernels.backend("cuda"), pytest.raises(vitkernels.BackendUnavailable, match="cuda"):
        vitkernels.accelerate(block)
    assert snapshot(block) == before


# --- revert ------------------------------------------------------------------------------------------------------------------------


def test_remove_is_exact(block: nn.Module, x: Tensor) -> None:
    before, expected = snapshot(block), block(x)
    handle = vitkernels.accelerate(block)
    zoo.results(block, x, training=False)
    block.zero_grad()
    handle.remove()
    assert snapshot(block) == before
    assert torch.equal(block(x), expected)
    assert "since reverted" in str(handle)
    handle.remove()


def test_context_manager(block: nn.Module) -> None:
    before = snapshot(block)
    with pytest.raises(KeyError), vitkernels.accelerate(block) as handle:
        assert handle.replaced and snapshot(block) != before
        raise KeyError
    assert snapshot(block) == before


def test_accelerating_twice(block: nn.Module) -> None:
    before = snapshot(block)
    first, second = vitkernels.accelerate(block), vitkernels.accelerate(block)
    assert not second.replaced and set(reasons(second).values()) == {"already accelerated"}
    second.remove()
    assert type(block).__name__ == "FusedMobileVitV2Block"
    first.remove()
    assert snapshot(block) == before


@pytest.mark.parametrize("inner_first", [True, False])
def test_two_handles_in_any_order(block: nn.Module, x: Tensor, inner_first: bool) -> None:
    before, original = snapshot(block), copy.deepcopy(block)
    inner = vitkernels.accelerate(block, only="LinearSelfAttention")
    outer = vitkernels.accelerate(block)
    assert (len(inner.replaced), len(outer.replaced)) == (2, 3)
    first, last = (inner, outer) if inner_first else (outer, inner)
    first.remove()
    zoo.assert_same(original, block, x, training=False)
    last.remove()
    assert snapshot(block) == before


# --- what a swapped class must survive ---------------------------------------------------------------------------------------------


def test_isinstance_and_state_dict(block: nn.Module, x: Tensor) -> None:
    from timm.models.mobilevit import MobileVitV2Block

    plain = zoo.timm_block().eval()
    vitkernels.accelerate(block)
    assert isinstance(block, MobileVitV2Block)
    assert list(block.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(block.state_dict(), strict=True)
    zoo.assert_same(plain, block, x, training=False)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    block.load_state_dict(plain.state_dict(), strict=True)  # nothing derived from the old weights may survive
    zoo.assert_same(plain, block, x, training=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    **{f"pickle {protocol}": lambda m, p=protocol: pickle.loads(pickle.dumps(m, p)) for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)},
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_accelerated_too(block: nn.Module, x: Tensor, way: str) -> None:
    handle = vitkernels.accelerate(block)
    twin = COPIES[way](block)
    assert type(twin) is type(block)
    assert torch.equal(twin(x), block(x))
    handle.remove()
    assert type(twin).__name__ == "FusedMobileVitV2Block"
    assert list(twin.state_dict()) == list(block.state_dict())


_LOAD = """
import sys, torch, vitkernels
assert not {{"timm", "transformers", "vit_pytorch", "torchvision"}} & set(sys.modules), "vitkernels imports a model zoo"
torch.set_num_threads({threads})
from tests import conftest
model, x, y = torch.load(sys.argv[1], weights_only=False)
assert type(model).__name__ == "FusedMobileVitV2Block", type(model)
assert torch.equal(model(x), y)
assert list(model.state_dict()) == list(torch.load(sys.argv[2]))
"""


def test_torch_save_into_a_fresh_process(block: nn.Module, x: Tensor, tmp_path: Path) -> None:
    vitkernels.accelerate(block)
    torch.save((block, x, block(x).detach()), tmp_path / "model.pt")
    torch.save(block.state_dict(), tmp_path / "state.pt")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _LOAD.format(threads=torch.get_num_threads()), str(tmp_path / "model.pt"), str(tmp_path / "state.pt")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_hooks_on_the_module_itself_are_kept(block: nn.Module, x: Tensor) -> None:
    """A hook on the attention sees what it always saw: the unfolded tensor."""
    seen: list[tuple[int, ...]] = []
    block.transformer[0].attn.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
    original = copy.deepcopy(block)
    handle = vitkernels.accelerate(block)
    assert reasons(handle) == {"": "a hook on a LinearSelfAttention expects [B, d, P, N]"}
    zoo.assert_same(original, block, x, training=False)
    assert set(seen) == {(2, 32, 4, 16)}


@pytest.mark.parametrize("path", ["transformer", "transformer.0", "transformer.1.norm2", "transformer.0.mlp.act", "norm"])
def test_hook_added_later_sees_what_it_always_saw(block: nn.Module, x: Tensor, path: str) -> None:
    handle = vitkernels.accelerate(block)
    shapes: list[tuple[int, ...]] = []
    hook = block.get_submodule(path).register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    block(x)
    assert len(shapes) == 1 and shapes[0][0] == 2 and shapes[0][2:] == (4, 16)
    assert list(handle.fallbacks) == [""]
    hook.remove()
    block(x)
    assert len(shapes) == 1


REGISTER: dict[str, Callable[[nn.Module, list[int]], Any]] = {
    "forward": lambda m, calls: m.register_forward_hook(lambda *_: calls.append(1)),
    "forward pre": lambda m, calls: m.register_forward_pre_hook(lambda *_: calls.append(1)),
    "backward": lambda m, calls: m.register_full_backward_hook(lambda *_: calls.append(1)),
    "backward pre": lambda m, calls: m.register_full_backward_pre_hook(lambda *_: calls.append(1)),
}


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("layer", ["qkv_proj", "attn_drop", "out_proj"])
def test_hook_on_a_bypassed_layer_runs(block: nn.Module, x: Tensor, layer: str, kind: str, later: bool) -> None:
    calls: list[int] = []
    if later:
        handle = vitkernels.accelerate(block)
    REGISTER[kind](block.get_submodule(f"{ATTENTION}.{layer}"), calls)
    if not later:
        handle = vitkernels.accelerate(block)
    block(x).sum().backward()
    assert calls == [1]
    told = handle.fallbacks if later else reasons(handle)
    assert "has a hook" in told[ATTENTION]


def test_global_hook_runs_everywhere(block: nn.Module, x: Tensor) -> None:
    def count() -> int:
        names: list[str] = []
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
        block(x)
        hook.remove()
        return len(names)

    expected = count()
    vitkernels.accelerate(block)
    assert count() == expected


class _LoRA(nn.Module):
    """As adapters do it: a module of another class in the layer's place."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Conv2d(base.in_channels, 2, 1, bias=False), nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class _OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def _lora(attention: Any) -> None:
    attention.qkv_proj = _LoRA(attention.qkv_proj)


def _own_forward(attention: Any) -> None:
    attention.out_proj.__class__ = _OwnForward


def _patched(attention: Any) -> None:
    forward = attention.out_proj.forward
    attention.out_proj.forward = lambda x: forward(x) + 1


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "LoRA": (_lora, "qkv_proj is a _LoRA"),
    "parametrized": (lambda a: parametrize.register_parametrization(a.out_proj, "weight", _Double()), "out_proj is a ParametrizedConv2d"),
    "weight norm": (lambda a: nn.utils.parametrizations.weight_norm(a.qkv_proj), "qkv_proj is a ParametrizedConv2d"),
    "pruned": (lambda a: prune.l1_unstructured(a.qkv_proj, "weight", 0.5), "qkv_proj has a hook"),
    "subclass": (_own_forward, "out_proj is a _OwnForward"),
    "patched": (_patched, "out_proj has a hook (or a forward of its own)"),
}


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layer_is_honoured(block: nn.Module, x: Tensor, change: str, later: bool) -> None:
    apply, words = CHANGES[change]
    torch.manual_seed(0)
    if later:
        handle = vitkernels.accelerate(block)
    apply(block.transformer[0].attn)
    if not later:
        handle = vitkernels.accelerate(block)
    with torch.no_grad():
        ours = block(x)
    assert words in (handle.fallbacks if later else reasons(handle))[ATTENTION]
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(ours, block(x))


def test_unknown_subclass_is_left_alone() -> None:
    from timm.models.mobilevit import LinearSelfAttention

    class Mine(LinearSelfAttention):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    mine = Mine(16)
    handle = vitkernels.accelerate(mine)
    assert type(mine) is Mine and "a subclass of LinearSelfAttention" in reasons(handle)[""]


def test_patched_forward_is_left_alone(block: nn.Module) -> None:
    block.transformer[0].attn.forward = lambda x: x
    assert reasons(vitkernels.accelerate(block))[ATTENTION] == "its forward is overridden on the instance"


class _Quantised(Tensor):
    """As quantisation libraries do it: a parameter whose data are of a Tensor subclass."""


def test_special_weight_is_left_alone(block: nn.Module) -> None:
    attention = block.transformer[0].attn
    attention.out_proj.weight = nn.Parameter(attention.out_proj.weight.detach().as_subclass(_Quantised))
    assert "weight of out_proj is a" in reasons(vitkernels.accelerate(block))[ATTENTION]


def test_mixed_dtypes_fail_as_they_did(block: nn.Module, x: Tensor) -> None:
    attention = block.transformer[0].attn
    tokens = x.reshape(2, 32, 4, 16)
    with pytest.raises(RuntimeError) as theirs:
        attention(tokens.double())
    vitkernels.accelerate(block)
    with pytest.raises(RuntimeError) as ours:
        attention(tokens.double())
    assert str(ours.value) == str(theirs.value)


def test_unbatched_input_runs_the_original(block: nn.Module) -> None:
    attention = block.transformer[0].attn
    attention.out_proj.weight.data.mul_(2)
    tokens = torch.randn(32, 4, 16)
    try:
        expected: Any = attention(tokens)
    except Exception as error:
        expected = type(error)
    vitkernels.accelerate(attention)
    if isinstance(expected, Tensor):
        assert torch.equal(attention(tokens), expected)
    else:
        with pytest.raises(expected):
            attention(tokens)


# --- compilers and transforms ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("make", [zoo.timm_block, zoo.transformers_model, zoo.cvnets_model], ids=["timm", "transformers", "cvnets"])
def test_compile_in_one_graph(make: Callable[[], nn.Module]) -> None:
    model = make()
    images = torch.randn(2, 32, 8, 8) if make is zoo.timm_block else zoo.photos(64)
    zoo.settle(model, images)
    original, compiled = copy.deepcopy(model), copy.deepcopy(model)
    handle = vitkernels.accelerate(compiled)
    compiled.compile(fullgraph=True, backend="aot_eager")
    zoo.assert_same(original, compiled, images, training=False)
    assert not handle.fallbacks


@pytest.mark.parametrize("strict", [False, True])
def test_export_gives_the_original_graph(block: nn.Module, x: Tensor, strict: bool) -> None:
    expected = block(x)
    vitkernels.accelerate(block)
    program = torch.export.export(block, (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in targets and not [target for target in targets if "vitkernels" in target]
    torch.testing.assert_close(program.module()(x), expected)


def test_trace_gives_the_original_graph(block: nn.Module, x: Tensor) -> None:
    expected = block(x)
    vitkernels.accelerate(block)
    with torch.no_grad():
        traced = torch.jit.trace(block, x, check_trace=False)
    assert "vitkernels" not in str(traced.inlined_graph)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), expected)


def test_fx_feature_extraction() -> None:
    """The feature extractor of timm treats a MobileVitV2Block as a leaf by isinstance; the accelerated one stays a leaf, and runs."""
    from timm.models._features_fx import FeatureGraphNet

    images = zoo.photos(64)
    model = zoo.settle(zoo.timm_model(), images).eval()
    accelerated = copy.deepcopy(model)
    vitkernels.accelerate(accelerated)
    theirs, ours = (FeatureGraphNet(m, out_indices=(2, 3)) for m in (model, accelerated))
    assert any(type(m).__name__ == "FusedMobileVitV2Block" for m in ours.modules())
    exact = copy.deepcopy(theirs).double()
    for three in zip(ours(images), theirs(images), exact(images.double()), strict=True):
        comparison = compare_tensors("feature", *three)
        assert comparison.holds, comparison


def test_functional_transforms(block: nn.Module, x: Tensor) -> None:
    """torch.func's transforms and forward-mode derivatives run through the original code."""

    def derivatives() -> list[Tensor]:
        parameters = dict(block.named_parameters())
        gradients = torch.func.grad(lambda p: torch.func.functional_call(block, p, (x,)).square().sum())(parameters)
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            tangent = torch.autograd.forward_ad.unpack_dual(block(torch.autograd.forward_ad.make_dual(x, x.flip(0)))).tangent
        return [*gradients.values(), torch.vmap(lambda one: block(one[None])[0])(x), tangent]

    expected = derivatives()
    handle = vitkernels.accelerate(block)
    for ours, theirs in zip(derivatives(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert "torch.func" in handle.fallbacks[""]


def test_functional_call_uses_the_weights_it_is_given(block: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    vitkernels.accelerate(block)
    ours = torch.func.functional_call(block, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(ours, other(x))


def test_training_step_updates_what_the_next_forward_uses(block: nn.Module, x: Tensor) -> None:
    original = copy.deepcopy(block)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05)  # made before accelerate: it must stay valid
    vitkernels.accelerate(block)
    theirs = torch.optim.SGD(original.parameters(), lr=0.05)
    for model, step in ((block, optimizer), (original, theirs)):
        model.train()
        model(x).square().mean().backward()
        step.step()
    assert not torch.equal(block.transformer[0].attn.qkv_proj.weight, zoo.timm_block().transformer[0].attn.qkv_proj.weight)
    zoo.assert_same(original, block, x, training=False)
