"""The Triton kernels of int8_linear as a backend: which calls they take, and how the arguments reach them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern import triton
from llmkern.backend import Backend
from llmkern.int8 import triton_configurations
from llmkern.int8.compiled import on_copies, refused, row_distance
from llmkern.int8.packing import layout_of, rows_of_16, sums_of_groups, sums_over_k
from llmkern.int8.scheme import PAIRS, ROTATION_STRIDE

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

#: As triton_kernels.FLAGGED, and the ways to choose a scale.
FLAGGED = 128
KINDS = {"row": 0, "symmetric": 1, "outliers": 2, "16bit": 3, "static": 4}
PRODUCTS = "llmkern.int8.triton_products"
FEW_ROWS = "llmkern.int8.triton_few_rows"
#: Rows and columns of results that a program of gather_kernel adds up: small, so that there are many.
GATHERED = (4, 128)
#: Rows that a program quantises: together they have enough loads on their way.
QUANTIZED_ROWS = 4
#: The largest Hadamard transform: a program holds 16 times as many elements.
MOST_ROTATED = 256


def _refused(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, inputs: str, group: int, rotate: int, activation: str, out: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the kernels cannot serve a call on a machine that runs them."""
    return rotation_refused(rotate) or refused(x, weight, weight_scale, bias)


def rotation_refused(rotate: int) -> str | None:
    if rotate > MOST_ROTATED:
        return f"rotate={rotate}: the Triton kernels transform at most {MOST_ROTATED} elements"
    return None


def hadamard(x: Tensor, out: Tensor, distance: int | None, rotate: int) -> triton.Launch:
    """The transform of x, whose rows are `distance` apart, into out (rows, depth), contiguous."""
    rows, depth = out.shape
    blocks, at_once = depth // (rotate * ROTATION_STRIDE), max(1, 2048 // (rotate * ROTATION_STRIDE))
    factor = float(1.0 / torch.tensor(float(rotate), device="cpu").sqrt())  # as the reference rounds it
    return triton.Launch(
        "llmkern.int8.triton_hadamard", "hadamard_kernel", (-(-rows // at_once) * blocks,),
        (x, out, rows, blocks, factor, distance, depth),
        {"SIZE": rotate, "STEPS": rotate.bit_length() - 1, "ROWS": at_once},
        {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}, ("out",),
    )  # fmt: skip


def _unsupported(x: Tensor, *args: Any) -> str | None:
    return triton.unsupported(x) or _refused(x, *args)


def plan(run: triton.Run, family: str, *args: Any) -> Callable[..., Tensor]:
    """A launcher for calls with the metadata of `args` on an architecture, whose kernels `run` runs."""
    x, weight, _, bias, residual, input_scale, inputs, group, _, activation, *rest = args
    out = rest[0] if rest else None
    distances = [None if t is None else row_distance(t) for t in (x, residual, out)]
    vectors = (bias, input_scale)
    if -1 in distances or not all(t is None or t.stride(0) == 1 or t.size(0) <= 1 for t in vectors):
        return on_copies(lambda *args: plan(run, family, *args))
    outputs, depth = weight.shape
    results = outputs // 2 if activation in PAIRS else outputs
    shape, rows, device, dtype = (*x.shape[:-1], results), math.prod(x.shape[:-1]), x.device, x.dtype
    groups = math.ceil(depth / group) if group else 1
    stride, words = -(-depth // 16) * 16, -(-depth // FLAGGED)
    two = inputs in ("outliers", "16bit")
    layout = layout_of(weight)
    tile = triton_configurations.tile(family, rows, group, activation in PAIRS, two)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    digits = {"TWO": two}
    even = {"EVEN": depth % FLAGGED == 0}
    follows = {
        "ACTIVATION": activation, "PAIRS": activation in PAIRS, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
    }  # fmt: skip
    few = rows <= tile.rows
    each = triton_configurations.split_depth(-(-outputs // tile.columns), depth, group) if few else max(depth, 1)
    splits = -(-depth // each)
    step = math.gcd(group, FLAGGED)
    # Up to 16 rows wait for the weight to come from memory, whatever copies it, and making descriptors takes time.
    described = rows > 16 and depth > 0 and triton.has_descriptors(family)
    shape_of_tile = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": step, "DESCRIBED": described}

    def launch(
        x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None,
        input_scale: Tensor | None, inputs: str, group: int, rotate: int, activation: str, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=device)
        if not (rows and results):
            return out
        along = rows_of_16(weight, layout)
        low = torch.empty(rows, stride, dtype=torch.int8, device=device)
        high = torch.empty_like(low) if two else low
        flags = torch.empty(rows, words, dtype=torch.int8, device=device) if two else low
        scale = torch.empty(rows, groups, dtype=torch.float32, device=device)
        zero = torch.empty(rows, groups, dtype=torch.int32, device=device)
        sums = sums_of_groups(weight, layout, group) if group else sums_over_k(weight, layout)
        rotated, distance = x, distances[0]
        if rotate > 1:
            rotated, distance = torch.empty(rows, depth, dtype=torch.float32, device=device), depth
            run(hadamard(x, rotated, distances[0], rotate))
        run(triton.Launch(
            "llmkern.int8.triton_kernels", "quantize_kernel", (-(-rows // QUANTIZED_ROWS),),
            (rotated, low, high, flags, scale, zero, scale if input_scale is None else input_scale,
             rows, depth, groups, distance, stride, words),
            {"INPUTS": KINDS[inputs], "GROUP": group, "GROUP_BLOCK": triton.power_of_two(group),
             "ROWS": QUANTIZED_ROWS},
            {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False},
            ("low", "scale", "zero", *(("high", "flags") if two else ())),
        ))  # fmt: skip
        scale_strides = (*weight_scale.stride(), 0)[:2]
        added = scale if bias is None else bias, out if residual is None else residual
        distances_after = distances[1] or 0, results if distances[2] is None else distances[2]
        of_rows: list[Any] = [low, high]
        of_weight: Any = along
        if described:
            of_rows = [triton.Descriptor(t[:, :depth], (tile.rows, step)) for t in of_rows]
            of_weight = triton.Descriptor(along[:, :depth], (tile.columns, step))
        if splits <= 1:
            programs = -(-rows // tile.rows) * -(-results // tile.columns)
            run(triton.Launch(
                PRODUCTS, "linear_kernel", (programs,),
                (*of_rows, flags, scale, zero, of_weight, weight_scale, sums, *added, out, rows, outputs, depth, groups,
                 stride, words, along.stride(0), *scale_strides, *distances_after),
                {**digits, **even, **follows, **shape_of_tile, "GROUP": group, "ABREAST": 8, "AT_ONCE": 64},
                options, ("out",),
            ))  # fmt: skip
            return out
        grid = -(-outputs // tile.columns), splits
        if group:
            partial = torch.empty(splits, rows, outputs, dtype=torch.float32, device=device)
            run(triton.Launch(
                FEW_ROWS, "split_groups_kernel", grid,
                (of_rows[0], scale, zero, of_weight, weight_scale, sums, partial, rows, outputs, depth, each // group,
                 groups, stride, along.stride(0), *scale_strides),
                {**shape_of_tile, "GROUP": group}, options, ("partial",),
            ))  # fmt: skip
        else:
            partial = torch.empty(splits, 1 + two, rows, outputs, dtype=torch.int32, device=device)
            run(triton.Launch(
                FEW_ROWS, "split_kernel", grid,
                (*of_rows, flags, of_weight, partial, rows, outputs, depth, each, stride, words, along.stride(0)),
                {**digits, **even, **shape_of_tile}, options, ("partial",),
            ))  # fmt: skip
        run(triton.Launch(
            FEW_ROWS, "gather_kernel", (-(-results // GATHERED[1]), -(-rows // GATHERED[0])),
            (partial, scale, zero, weight_scale, sums, *added, out, rows, outputs, splits, scale_strides[0],
             *distances_after),
            {**digits, **follows, "GROUPS": group > 0, "ROWS": GATHERED[0], "COLUMNS": GATHERED[1]},
            {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}, ("out",),
        ))  # fmt: skip
        return out

    return launch


def _plan(x: Tensor, *args: Any) -> Callable[..., Tensor]:
    return plan(triton.run, triton.family(x.device), x, *args)


#: int8_linear(x, weight, weight_scale, bias, residual, input_scale, inputs, group, rotate, activation[, out]) -> y
TRITON_INT8_LINEAR = Backend("triton", _plan, _unsupported)


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles, with K = N = 4096 in bfloat16: each line of the table of tiles
    with bias and residual, quantisation, the rotation, and the gradient of the input."""
    from llmkern.inspect.limits import TARGETS
    from llmkern.inspect.triton_source import Compilation
    from llmkern.int8 import triton_gradient_launch

    for rows, inputs, group, activation, rotate in (
        (8, "outliers", 0, "none", 1), (8, "16bit", 0, "swiglu", 1), (8, "row", 128, "none", 1),
        (64, "row", 0, "none", 1), (64, "row", 128, "none", 1), (256, "row", 0, "none", 1),
        (512, "row", 0, "none", 1), (512, "outliers", 0, "none", 1), (512, "outliers", 0, "swiglu", 1),
        (512, "row", 128, "none", 1), (512, "row", 128, "swiglu", 1), (8, "row", 0, "none", 64),
    ):  # fmt: skip
        x, weight = (torch.empty(n, 4096, device="meta", dtype=torch.bfloat16) for n in (rows, 4096))
        scale = torch.empty(4096, 32, device="meta") if group else torch.empty(4096, device="meta")
        bias, residual = torch.empty(4096, device="meta"), x[:, :2048] if activation in PAIRS else x
        arguments = (x, weight.to(torch.int8), scale, bias, residual, None, inputs, group, rotate, activation)
        by_tile: dict[tuple[triton_configurations.Tile, bool], list[str]] = {}
        for target in TARGETS:
            tile = triton_configurations.tile(target, rows, group, activation in PAIRS, inputs in ("outliers", "16bit"))
            by_tile.setdefault((tile, triton.has_descriptors(target)), []).append(target)
        config = f"{inputs}, {group or 'no groups'}, {activation}, M={rows}"
        for targets in by_tile.values():
            launches: list[triton.Launch] = []
            plan(launches.append, targets[0], *arguments)(*arguments)
            for launch in launches:
                alike = launch.kernel in ("quantize_kernel", "hadamard_kernel")  # on every architecture
                if launch.kernel == "quantize_kernel" and (rows, activation) != (512, "none"):
                    continue
                if rotate > 1 and launch.kernel != "hadamard_kernel":
                    continue
                if not alike or targets[0] == TARGETS[0]:
                    yield Compilation.of(launch, config, () if alike else targets)
    yield from triton_gradient_launch.compilations()
