"""Linear sum assignment: the matching itself, exact, many problems in one call, on the host (vitkernels/ops/matching/README.md says why there)."""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from vitkernels import host
from vitkernels.ops.matching.layout import TargetLayout

Invalid = Literal["replace", "raise"]
Array = np.ndarray[Any, Any]
Costs = TypeVar("Costs", Array, Tensor)


@overload
def linear_sum_assignment(costs: Costs, layout: None = None, *, invalid: Invalid = "replace") -> tuple[Costs, Costs]: ...
@overload
def linear_sum_assignment(costs: Costs, layout: TargetLayout, *, invalid: Invalid = "replace") -> Costs: ...
def linear_sum_assignment(costs: Any, layout: TargetLayout | None = None, *, invalid: Invalid = "replace") -> Any:
    """The assignment of least total cost: of each target to a query of its image, for all layers and images; or of rows to columns of one matrix.

    Exact, with ``scipy.optimize.linear_sum_assignment``'s own indices, ties included: the same shortest augmenting paths in the same order, in
    float64 whatever the dtype of the costs. Several problems are solved by several threads, with Python's lock released.

    Args:
        costs: a numpy array or a tensor, real. With a layout [L, T, Q] or [T, Q], as :func:`pairwise_box_cost` gives them: row t holds the costs of
            target t for the queries of its image. Without, one matrix [N, M], rows to be assigned to columns. From a GPU it is copied once, which
            waits for the GPU.
        layout: which targets belong to which image.
        invalid: what becomes of NaN and infinities. ``"replace"``: each counts as the largest finite cost of its problem (0 where there is none), and
            one warning for the call names the first image. ``"raise"``: a ValueError names it.

    Returns:
        With a layout, ``matches`` int64 [L, B, Q] or [B, Q], on the device of the costs: the target of each query, counted over the batch, or -1.
        min(Q, T_b) queries of image b are matched. ``layout.pairs`` makes lists of index pairs of it.
        Without, as scipy: the matched rows, ascending, and their columns, int64 [min(N, M)] each. Numpy arrays for an array, tensors for a tensor.

    Raises:
        ValueError: a wrong shape, another number of targets than the layout's, a NaN or an infinity with ``invalid="raise"``.
        TypeError: something that is neither array nor tensor, complex costs.

    Paper: D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52(4), 2016, algorithm in section III.
    """
    op = "linear_sum_assignment"
    if invalid not in ("replace", "raise"):
        raise ValueError(f"{op}: invalid is {invalid!r}; it must be one of 'replace', 'raise'")
    assign = found = None
    if layout is None and (assign := host.compiled("assign")) is not None and (found := assign(costs)) is not None:
        row, column, replaced = found  # of an array as it is needed: shorter than any check of it
        if not replaced:
            return row, column
    is_tensor = isinstance(costs, Tensor)
    array = _as_array(op, costs)
    if layout is None:
        if array.ndim != 2:
            raise ValueError(f"{op}: costs has shape {list(array.shape)}; it must be [N, M], or come with a layout")
        row, column, replaced = found or (assign or _solve_one)(array)
        if replaced:
            _report(op, invalid, "costs")
        if not is_tensor:
            return row, column
        row, column = torch.from_numpy(row), torch.from_numpy(column)
        return (row, column) if costs.is_cpu else (row.to(costs.device), column.to(costs.device))
    if not isinstance(layout, TargetLayout):
        raise TypeError(f"{op}: layout is a {type(layout).__name__}; it must be a TargetLayout, or None for one matrix")
    if array.ndim not in (2, 3):
        raise ValueError(f"{op}: costs has shape {list(array.shape)}; it must be [L, T, Q] or [T, Q]")
    if array.shape[-2] != layout.total:
        raise ValueError(f"{op}: costs has shape {list(array.shape)}; it must have T = {layout.total} rows, the targets of the layout")
    layers = array if array.ndim == 3 else array[None]
    matches, replaced = (host.compiled("assign_all") or _solve_all)(layers, layout.offsets, torch.get_num_threads())
    if replaced.any():
        layer, image = (int(i) for i in np.argwhere(replaced)[0])
        where = f"the costs of image {image}" + (f" in layer {layer}" if array.ndim == 3 else "")
        _report(op, invalid, where, int(replaced.any(0).sum()) - 1)
    matches = matches if array.ndim == 3 else matches[0]
    return torch.from_numpy(matches).to(costs.device) if is_tensor else matches


def _report(op: str, invalid: Invalid, where: str, more: int = 0) -> None:
    others = f" (and of {more} more images)" if more > 0 else ""
    if invalid == "raise":
        raise ValueError(f"{op}: {where}{others} hold NaN or infinities; they must be finite, or invalid='replace'")
    warnings.warn(
        f"{op}: {where}{others} hold NaN or infinities, which count as the largest finite cost; the predictions may have diverged",
        RuntimeWarning,
        stacklevel=3,
    )


def _as_array(op: str, costs: Any) -> Array:
    """Float32 or float64 and contiguous: other dtypes become one of the two without loss."""
    if isinstance(costs, Tensor):
        if costs.requires_grad:
            costs = costs.detach()
        if costs.dtype is torch.bfloat16 or costs.dtype is torch.float16:
            costs = costs.float()
        costs = costs.numpy() if costs.is_cpu else costs.cpu().numpy()
    elif not isinstance(costs, np.ndarray):
        raise TypeError(f"{op}: costs is a {type(costs).__name__}; it must be a numpy array or a Tensor")
    if costs.dtype.char not in "fd" or not costs.dtype.isnative:
        if costs.dtype.kind not in "fiub":
            raise TypeError(f"{op}: costs has dtype {costs.dtype}; it must be real")
        costs = costs.astype(np.float64)
    return costs if costs.flags.c_contiguous else np.ascontiguousarray(costs)


# --- where the host module is not built -----------------------------------------------------------------------------------------------


def _solve_all(layers: Array, offsets: tuple[int, ...], threads: int) -> tuple[Array, Array]:
    """csrc/host/assignment.h in Python, on one thread: matches [L, B, Q] and where costs were replaced, [L, B]."""
    images = len(offsets) - 1
    matches = np.full((layers.shape[0], images, layers.shape[2]), -1, np.int64)
    replaced = np.zeros((layers.shape[0], images), bool)
    for layer, costs in enumerate(layers):
        for image in range(images):
            queries, targets, replaced[layer, image] = _solve_one(costs[offsets[image] : offsets[image + 1]].T)
            matches[layer, image, queries] = targets + offsets[image]
    return matches, replaced


def _solve_one(costs: Array) -> tuple[Array, Array, bool]:
    """Rows and columns of one matrix, and whether costs were replaced."""
    finite = np.isfinite(costs)
    costs = np.where(finite, costs, costs.max(initial=-np.inf, where=finite) if finite.any() else 0.0).astype(np.float64)
    if costs.shape[0] <= costs.shape[1]:
        return np.arange(costs.shape[0]), _columns_of_rows(costs), not finite.all()
    row = _columns_of_rows(costs.T)
    order = np.argsort(row)
    return row[order], order, not finite.all()


@np.errstate(over="ignore", invalid="ignore")
def _columns_of_rows(costs: Array) -> Array:
    """Crouse's algorithm for N <= M: each row in turn is given a column along the cheapest path of exchanges."""
    rows, columns = costs.shape
    u, v = np.zeros(rows), np.zeros(columns)
    row_of, column_of = np.full(columns, -1), np.full(rows, -1, np.int64)
    for current in range(rows):
        length, came_from = np.full(columns, np.inf), np.full(columns, -1)
        left = np.arange(columns - 1, -1, -1)  # columns not reached yet, in the order in which scipy looks at them, which decides ties
        reached_rows, reached_columns = [], []
        row, lowest, sink = current, 0.0, -1
        while sink < 0:
            reached_rows.append(row)
            through = lowest + costs[row, left] - u[row] - v[left]
            shorter = through < length[left]
            length[left[shorter]], came_from[left[shorter]] = through[shorter], row
            lowest = length[left].min()
            nearest = np.flatnonzero(length[left] == lowest)
            free = nearest[row_of[left[nearest]] < 0]
            at = free[-1] if free.size else nearest[0]  # of equals the last that is free, else the first
            column = left[at]
            if row_of[column] < 0:
                sink = column
            else:
                row = row_of[column]
            reached_columns.append(column)
            left[at] = left[-1]
            left = left[:-1]
        u[current] += lowest
        for row in reached_rows[1:]:
            u[row] += lowest - length[column_of[row]]
        v[reached_columns] -= lowest - length[reached_columns]
        while True:
            row = came_from[sink]
            row_of[sink] = row
            column_of[row], sink = sink, column_of[row]
            if row == current:
                break
    return column_of
