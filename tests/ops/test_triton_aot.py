"""The Triton kernels compiled ahead of time for real GPUs: shared memory within the limit and no register spilled. No GPU needed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter cannot be compiled", allow_module_level=True)

from triton.runtime.jit import JITFunction

from vitkernels import aot
from vitkernels.ops import _triton as shared
from vitkernels.ops.cascaded_group import triton as cascaded_group
from vitkernels.ops.head_mixing import triton as head_mixing
from vitkernels.ops.matching import triton as matching
from vitkernels.ops.memory import triton as memory
from vitkernels.ops.packed import triton as packed
from vitkernels.ops.separable import triton as separable

# What differs between launches of one width: tile sizes (batch), address arithmetic (layout), dropout's further inputs.
_MAP: dict[str, Any] = {}
_CHANNELS_LAST = {"channels_last": True, "dropout": True}
_ONE_IMAGE = {"batch": 1, "unfolded": True}
# MobileViTv2's widths, each with one of the cases; `python -m vitkernels.aot` compiles more.
CASES = (
    (64, torch.bfloat16, _MAP),
    (128, torch.bfloat16, _ONE_IMAGE),
    (192, torch.bfloat16, _ONE_IMAGE),
    (256, torch.bfloat16, _CHANNELS_LAST),
    (384, torch.bfloat16, _MAP),
    (512, torch.bfloat16, _CHANNELS_LAST),
    (192, torch.float32, _MAP),
    (512, torch.float32, _ONE_IMAGE),
)


# EfficientViT: few channels per head, many, and 16 tokens a window; the last also channels_last and without biases. Float32 where most loops unroll,
# which takes the most registers. `python -m vitkernels.aot` compiles all stages.
STAGES = (
    ("m0 stage 1", torch.bfloat16, {}),
    ("m0 stage 2", torch.float32, {}),
    ("m4 stage 2", torch.bfloat16, {}),
    ("m5 stage 3", torch.bfloat16, {"channels_last": True, "bias": False}),
)

# NaViT's head dim with its norm; float32, which takes the most registers. `python -m vitkernels.aot` compiles all.
PACKED = ((64, torch.bfloat16, "norm"), (64, torch.float32, "plain"))
# ViT-B's heads, with a bias for each image.
ATTENTION = ((64, torch.bfloat16, "bias of images"), (64, torch.float32, "bias of images"))
# ViT-B's heads and the widest, float32.
MEMORY = ((64, torch.bfloat16, "tasks"), (64, torch.float32, "tasks dropout"), (256, torch.float32, "one"))
# DeepViT-S, whose rows are padded, with both norms; float32.
RE_ATTENTION = ((33, torch.bfloat16, "batch live"), (64, torch.bfloat16, "layer"), (32, torch.float32, "batch live"))


# COCO's classes; the last option also raises to a power.
MATCHING = ((92, torch.float32, "softmax"), (92, torch.bfloat16, "focal, gamma 1.5"))


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.") if not isinstance(value, dict) else " ".join(value) or "map"


def _assert_all_fit(table: list[aot.Budget]) -> None:
    assert {b.target for b in table} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(b.registers > 0 for b in table)
    misfits = [f"{b.kernel} on {b.target}: {b.shared} of {b.shared_limit} bytes shared, {b.spills} spilled" for b in table if not b.fits]
    assert not misfits, "\n".join(misfits)


@pytest.mark.parametrize(("dim", "dtype", "case"), CASES, ids=_name)
def test_every_separable_kernel_fits_every_target(dim: int, dtype: torch.dtype, case: dict[str, Any]) -> None:
    _assert_all_fit(aot.budgets(lambda: aot.separable_launches(dim, dtype, **case), ""))


@pytest.mark.parametrize(("name", "dtype", "case"), STAGES, ids=_name)
def test_every_cascaded_group_kernel_fits_every_target(name: str, dtype: torch.dtype, case: dict[str, Any]) -> None:
    _assert_all_fit(aot.budgets(lambda: aot.cascaded_group_launches(_stage(name), dtype, **case), name))


@pytest.mark.parametrize(("dim", "dtype", "options"), PACKED, ids=_name)
def test_every_packed_kernel_fits_every_target(dim: int, dtype: torch.dtype, options: str) -> None:
    _assert_all_fit(aot.budgets(lambda: aot.packed_launches(dim, dtype, **aot.PACKED_OPTIONS[options]), options))


@pytest.mark.parametrize(("dim", "dtype", "options"), ATTENTION, ids=_name)
def test_every_attention_kernel_fits_every_target(dim: int, dtype: torch.dtype, options: str) -> None:
    _assert_all_fit(aot.budgets(lambda: aot.attention_launches(dim, dtype, **aot.ATTENTION_OPTIONS[options]), options))


@pytest.mark.parametrize(("dim", "dtype", "options"), MEMORY, ids=_name)
def test_every_memory_kernel_fits_every_target(dim: int, dtype: torch.dtype, options: str) -> None:
    _assert_all_fit(aot.budgets(lambda: aot.memory_launches(dim, dtype, **aot.MEMORY_OPTIONS[options]), options))


@pytest.mark.parametrize(("dim", "dtype", "options"), RE_ATTENTION, ids=_name)
def test_every_re_attention_kernel_fits_every_target(dim: int, dtype: torch.dtype, options: str) -> None:
    _assert_all_fit(aot.budgets(lambda: aot.re_attention_launches(dim, dtype, **aot.RE_ATTENTION_OPTIONS[options]), options))


def test_seventeen_heads_fit_an_h100() -> None:
    """In fp32, with the sums of a live batch norm, which took more shared memory than there is. They spill (README); on an A100 they do not fit."""
    table = aot.budgets(lambda: aot.re_attention_launches(8, torch.float32, heads=17, tokens=7, norm="batch", live=True), "", ("sm_90",))
    assert len(table) > 5
    misfits = [f"{b.kernel}: {b.shared} of {b.shared_limit} bytes shared" for b in table if b.shared > b.shared_limit]
    assert not misfits, "\n".join(misfits)


@pytest.mark.parametrize(("classes", "dtype", "options"), MATCHING, ids=_name)
def test_every_matching_kernel_fits_every_target(classes: int, dtype: torch.dtype, options: str) -> None:
    _assert_all_fit(aot.budgets(lambda: aot.matching_launches(classes, dtype, **aot.MATCHING_OPTIONS[options]), options))


def _stage(name: str) -> aot.Stage:
    return next(stage for stage in aot.STAGES if stage.name == name)


@pytest.mark.parametrize(
    ("module", "launches", "count"),
    [
        (separable, lambda: aot.separable_launches(64, torch.bfloat16), 10),
        (shared, lambda: aot.separable_launches(64, torch.bfloat16), 1),
        (packed, lambda: aot.packed_launches(32, torch.bfloat16, **aot.PACKED_OPTIONS["all"]), 5),
        (cascaded_group, lambda: aot.cascaded_group_launches(_stage("m0 stage 1"), torch.bfloat16), 8),
        (matching, lambda: aot.matching_launches(92, torch.bfloat16), 3),
        (memory, lambda: aot.memory_launches(64, torch.bfloat16, **aot.MEMORY_OPTIONS["tasks"]), 3),
        (head_mixing, lambda: aot.re_attention_launches(32, torch.bfloat16, **aot.RE_ATTENTION_OPTIONS["batch live"]), 6),
    ],
    ids=["separable", "shared", "packed", "cascaded_group", "matching", "memory", "head_mixing"],
)
def test_every_kernel_is_compiled(module: ModuleType, launches: Callable[[], list[aot.Launch]], count: int) -> None:
    kernels = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and name.endswith("_kernel")}
    kernels = {name for name in kernels if getattr(module, name).__module__ == module.__name__}
    assert kernels <= {launch.name for launch in launches()}
    assert len(kernels) == count


def test_amd_gets_the_launches_of_rocm() -> None:
    """A wavefront is two warps wide: with as many of them a thread would have half the registers. And CUDA's limit of registers is unknown there."""
    options = {}
    for target in ("sm_90", "gfx942"):
        found: list[aot.Launch] = []

        def launches(found: list[aot.Launch] = found) -> list[aot.Launch]:
            found += aot.cascaded_group_launches(_stage("m4 stage 2"), torch.bfloat16)
            return []

        aot.budgets(launches, "", [target])
        options[target] = dict(found[0].options)
    assert options["sm_90"]["num_warps"] == 2 * options["gfx942"]["num_warps"]
    assert "maxnreg" in options["sm_90"] and "maxnreg" not in options["gfx942"]
    assert torch.version.hip is None


def _forward_kernel(dim: int) -> aot.Launch:
    return next(launch for launch in aot.separable_launches(dim, torch.bfloat16) if launch.name == "separable_self_attention_fwd_kernel")


@pytest.mark.parametrize(("target", "squeeze"), [("sm_80", {"maxnreg": 64}), ("gfx942", {"waves_per_eu": 8, "num_warps": 2})])
def test_a_spill_is_seen(target: str, squeeze: dict[str, int]) -> None:
    """Refused the registers it needs, the kernel spills, and its budget says so."""
    launch = _forward_kernel(256)
    options = tuple({**dict(launch.options), **squeeze}.items())
    squeezed = aot.budget(dataclasses.replace(launch, options=options), target, "squeezed")
    assert squeezed.spills > 0
    assert not squeezed.fits


def test_shared_memory_beyond_the_limit_is_seen() -> None:
    """A tile of 512 x 512 weights beside one of 64 x 512 pixels is more than LDS holds."""
    launch = _forward_kernel(512)
    constants = tuple({**dict(launch.constants), "BLOCK_E": 128, "BLOCK_K": 256}.items())
    large = aot.budget(dataclasses.replace(launch, constants=constants), "gfx942", "large")
    assert large.shared > large.shared_limit
    assert not large.fits
