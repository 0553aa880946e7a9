"""Triton's attention kernels as backends: which calls they take, and how the arguments reach them.

Triton is imported when a call comes, never with the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern import triton
from llmkern.attention.compiled.dense import as_rows, empty_grad_scores, mask_grad_of, sink_grad
from llmkern.attention.compiled.params import as_sink, plain, through_copies
from llmkern.attention.layout import empty_in_order
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import DESCRIBED, Configuration, configuration, family
from llmkern.backend import Backend
from llmkern.random import drop_below

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

WIDEST = 256
#: Queries and keys are numbered in 32 bits, with room for the sum of a place and a window.
_MOST_ROWS = 2**28
MOST_WINDOW = 2**29
#: Offsets within a tile, of at most 256 rows or columns, have 32 bits.
_MOST_APART = 2**23
LOG2E = 1.4426950408889634


def padded(n: int) -> int:
    """The power of two that is at least n, and 16, which a matrix instruction needs."""
    return max(triton.power_of_two(n), 16)


_FORWARD, *_GRADIENTS = (
    f"llmkern.attention.triton_{name}" for name in ("forward", "backward", "backward_queries", "backward_keys")
)
_BACKWARD = dict(zip(("statistics", "queries", "keys"), _GRADIENTS, strict=True))


def family_of(device: torch.device) -> str:
    return family(None if torch.version.hip else torch.cuda.get_device_capability(device))


def precision(dtype: torch.dtype, family: str) -> str:
    """How float32 is multiplied: as torch's own products are, exactly or by tf32; in three products of tf32, which
    keeps float32's accuracy, where matrix units know tf32 but not float32."""
    if dtype != torch.float32:
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee" if family.startswith("gfx") else "tf32x3"


class Call:
    """What every kernel is told of a call: all that its metadata decide, and the arguments made of its tensors."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, rules: Sequence[Any]) -> None:
        mask, (scale, uniform) = Mask(*rules[:10]), rules[10:12]
        (self.batch, self.heads, self.queries, width), self.kv_heads, self.keys = query.shape, key.size(1), key.size(2)
        self.group = self.heads // max(self.kv_heads, 1)
        left, right = mask.window_left, mask.window_right
        dense = mask.dense
        kind = 0 if dense is None else 1 if dense.dtype == torch.bool else 2
        bends = mask.softcap > 0.0 or mask.alibi_slopes is not None or kind == 2 or scale <= 0.0
        hides = left >= 0 or right >= 0 or mask.key_lengths is not None or kind > 0
        empty_rows = left >= 0 or (right >= 0 and mask.bottom_right) or mask.key_lengths is not None or kind > 0
        dropout = mask.dropout_p > 0.0
        self.rules = {
            "LEFT": left >= 0, "RIGHT": right >= 0, "BOTTOM_RIGHT": mask.bottom_right,
            "LENGTHS": mask.key_lengths is not None, "MASK": kind, "SOFTCAP": mask.softcap > 0.0,
            "ALIBI": mask.alibi_slopes is not None, "SINK": mask.learnable_sink is not None, "DROPOUT": dropout,
            "UNIFORM": bool(uniform and empty_rows and mask.learnable_sink is None and self.keys), "BEND": bends,
            "HIDES": hides,
        }  # fmt: skip
        self.widths = {"D": width, "DV": value.size(3)}
        self.widths |= {"BLOCK_D": padded(width), "BLOCK_DV": padded(value.size(3))}
        #: What decides about the tiles: the padded width, and whether rules need registers.
        self.shape = max(self.widths["BLOCK_D"], self.widths["BLOCK_DV"]), bends or kind > 0 or dropout
        below = drop_below(mask.dropout_p)
        keep = 0.0 if mask.dropout_p >= 1.0 else 1.0 / (1.0 - mask.dropout_p)
        sizes = (self.heads, self.group, self.queries, self.keys)
        windows = tuple(min(max(x, 0), MOST_WINDOW) for x in (left, right))
        unit = LOG2E * (1.0 if bends else scale)
        # As a signed number of 32 bits, so that the kernel's type is the same for all.
        below -= 2**32 if below >= 2**31 else 0
        self.numbers = (*sizes, *windows, scale, unit, mask.softcap, below, keep)
        self.dense_steps: tuple[int, ...] = (0, 0, 0, 0)
        if dense is not None:
            self.dense_steps = dense.expand(self.batch, self.heads, self.queries, self.keys).stride()
        lengths, slopes = mask.key_lengths, mask.alibi_slopes
        self.steps = (
            0 if lengths is None else lengths.stride(0),
            slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
            0 if slopes is None else slopes.stride(-1),
        )

    def tensors(self, query: Tensor, rules: Sequence[Any]) -> tuple[Any, ...]:
        """(mask, lengths, slopes, sink, seed) as the kernels read them; query stands for a tensor that is not there.

        The seed lies on the CPU and goes by value: a copy to the device could not be part of a CUDA graph.
        """
        mask, lengths, slopes, sink, seed = rules[:5]
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        tensors = (query if t is None else t for t in (mask, lengths, slopes, as_sink(sink)))
        return *tensors, 0 if seed is None else int(seed)

    def descriptors(self, described: bool, block: int, *tensors: Tensor) -> list[Any]:
        """For two tensors as wide as keys and values, blocks of `block` rows; what is not described stands for itself,
        and is not looked at."""
        if not described:
            return [*tensors]
        widths = (self.widths["BLOCK_D"], self.widths["BLOCK_DV"])
        return [triton.Descriptor(t, (1, 1, block, width)) for t, width in zip(tensors, widths, strict=True)]

    def constants(self, tile: Configuration, dtype: torch.dtype, family: str) -> dict[str, Any]:
        of_tile = {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
        return {**self.widths, **of_tile, **self.rules, "PRECISION": precision(dtype, family)}


def may_describe(family: str, call: Call, *tensors: Tensor) -> bool:
    """Whether the kernels read these tensors through descriptors, where their addresses allow it."""
    usual = family in DESCRIBED and tensors[0].element_size() == 2 and not call.shape[1]
    return usual and all(map(triton.describable, tensors))


def options(tile: Configuration) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def forward(run: triton.Run, family: str, query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> Callable[..., Any]:
    """The launcher of all calls with these metadata, by `run` with the configurations of `family`."""
    if any(plain(t) is not t for t in (query, key, value)):
        return through_copies(lambda *args: forward(run, family, *args), 3)
    call = Call(query, key, value, rules)
    may = may_describe(family, call, key, value)
    tiles = {d: configuration("forward", family, query.element_size(), *call.shape, d) for d in {False, may}}

    def launch(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
        output = empty_in_order(query, value.size(3))
        logsumexp = torch.empty(query.shape[:3], dtype=torch.float64, device=query.device)
        described = may and triton.aligned(key, value)
        tile = tiles[described]
        programs = call.batch * call.heads * -(-call.queries // tile.queries)
        if programs:
            strides = sum((t.stride()[:3] for t in (query, key, value, output)), ())
            arguments = (
                query, key, value, *call.descriptors(described, tile.keys, key, value), output, logsumexp,
                *call.tensors(query, rules), *call.numbers, *strides,
                *call.dense_steps, *call.steps,
            )  # fmt: skip
            constants = {**call.constants(tile, query.dtype, family), "DESCRIBED": described}
            run(triton.Launch(
                _FORWARD, "attention_forward_kernel", (programs,), arguments, constants, options(tile),
                ("output", "logsumexp"),
            ))  # fmt: skip
        return output, logsumexp

    return launch


def from_weights(query: Tensor, key: Tensor, call: Call, mask_grad: bool) -> bool:
    """Whether delta is summed over the weights themselves and not made of the rounded output: where the rounding of
    the output would be seen in a sum of the scores' gradients, and where it costs next to nothing."""
    seen = mask_grad or call.rules["SINK"] or call.rules["SOFTCAP"]
    return bool(seen or key.size(2) <= 128 or query.size(2) <= 24)


def backward(
    run: triton.Run, family: str, grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, output: Tensor, logsumexp: Tensor, *rest: Any,
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    """As `forward`, for the gradients."""
    if any(plain(t) is not t for t in (grad_output, query, key, value, output)):
        return through_copies(lambda *args: backward(run, family, *args), 6)
    *rules, mask_grad = rest
    mask_grad = bool(mask_grad and rules[0] is not None)
    call = Call(query, key, value, rules)
    may = {"queries": may_describe(family, call, key, value), "keys": may_describe(family, call, query, grad_output)}
    tiles = {
        (k, d): configuration(k, family, query.element_size(), *call.shape, d)
        for k in _BACKWARD for d in {False, may.get(k, False)}
    }  # fmt: skip
    rows, of_keys = call.batch * call.heads, call.batch * call.kv_heads
    added = {"ADDED": grad_logsumexp is not None}
    weighed = from_weights(query, key, call, mask_grad)

    def launch(
        grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        logsumexp: Tensor, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dquery, dkey, dvalue = (empty_in_order(t, t.size(3)) for t in (query, key, value))
        mask, sink = rest[0], rest[3]
        grad_scores = empty_grad_scores(query, key, mask_grad)
        statistics = torch.empty((4, *query.shape[:3]), dtype=torch.float32, device=query.device)
        logsumexp, of_sums = logsumexp.contiguous(), as_rows(grad_logsumexp)
        tensors = call.tensors(query, rest)
        numbers = (statistics[0].numel(), *call.numbers)

        def launch_one(
            which: str, name: str, before: Sequence[Tensor], after: Sequence[Tensor], strides: Sequence[Tensor],
            written: tuple[str, ...], read: Sequence[Tensor] = (), **constants: bool,
        ) -> None:  # fmt: skip
            """read: what goes by in blocks, through descriptors where it can."""
            described = may.get(which, False) and triton.aligned(*read)
            tile = tiles[which, described]
            if which == "keys":
                programs, block = of_keys * -(-call.keys // tile.keys), tile.queries
            else:
                programs, block = rows * -(-call.queries // tile.queries), tile.keys
            if read:
                constants["DESCRIBED"] = described
            steps = sum((t.stride()[:3] for t in strides), ())
            rows_of = call.descriptors(described, block, *read)
            arguments = (*before, *rows_of, *after, *tensors, *numbers, *steps, *call.dense_steps, *call.steps)
            made = {**call.constants(tile, query.dtype, family), **added, **constants}
            changed = ("grad_scores",) if constants.get("MASK_GRAD") else ()
            run(triton.Launch(
                _BACKWARD[which], name, (programs,), arguments, made, options(tile), written, changed,
            ))  # fmt: skip

        if rows * call.queries:
            launch_one(
                "statistics", "attention_statistics_kernel",
                (query, key, value, output, grad_output, logsumexp, logsumexp if of_sums is None else of_sums,
                 statistics), (),
                (query, key, value, output, grad_output), ("statistics",), FROM_WEIGHTS=weighed,
            )  # fmt: skip
            launch_one(
                "queries", "attention_backward_query_kernel",
                (query, key, value, grad_output),
                (statistics, dquery, query if grad_scores is None else grad_scores),
                (query, key, value, grad_output, dquery), ("grad_query",), (key, value),
                MASK_GRAD=mask_grad, CENTRE=not weighed,
            )  # fmt: skip
        if of_keys * call.keys:
            launch_one(
                "keys", "attention_backward_key_kernel", (query, key, value, grad_output), (statistics, dkey, dvalue),
                (query, key, value, grad_output, dkey, dvalue), ("grad_key", "grad_value"), (query, grad_output),
            )  # fmt: skip
        of_sink = sink_grad(sink, statistics[2], logsumexp, of_sums)
        return dquery, dkey, dvalue, mask_grad_of(query, mask, grad_scores), of_sink

    return launch


def limits(query: Tensor, key: Tensor, value: Tensor, rules: Sequence[Any]) -> str | None:
    """Why the kernels cannot take tensors (B, H, S, D) of these shapes, wherever they are."""
    width = max(query.shape[-1], value.shape[-1])
    if width > WIDEST:
        return f"its kernels take heads of width 0 to {WIDEST}, not {width}"
    rows = max(query.shape[2], key.shape[2])
    if rows > _MOST_ROWS:
        return f"its kernels take up to 2^28 queries and keys, not {rows}"
    if math.prod(query.shape[:2]) * -(-rows // 16) >= 2**31:
        return f"its kernels take fewer than 2^31 tiles of 16 rows, not {tuple(query.shape[:3])}"
    apart = max(t.stride(2) if t.stride(-1) == 1 else t.shape[-1] for t in (query, key, value))
    if rules[0] is not None:
        apart = max(apart, *rules[0].stride()[2:])
    if apart >= _MOST_APART:
        return f"its kernels take rows fewer than 2^23 elements apart, not {apart}"
    if rules[9] > 0.0 and rules[11]:
        return "its kernels do not drop weights of rows that attend to all keys alike"
    return None


def unsupported(x: Tensor) -> str | None:
    """Why no kernel of Triton's can work on x."""
    reason = triton.unsupported(x)
    if reason is None and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"{x.device} has an older compute capability than 8.0"
    return reason


TRITON_ATTENTION = Backend(
    "triton",
    lambda query, *args: forward(triton.run, family_of(query.device), query, *args),
    lambda query, key, value, *rules: unsupported(query) or limits(query, key, value, rules),
)


def _backward_unsupported(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> str | None:  # fmt: skip
    return unsupported(query) or limits(query, key, value, rest)


TRITON_ATTENTION_BACKWARD = Backend(
    "triton", lambda grad, *args: backward(triton.run, family_of(grad.device), grad, *args), _backward_unsupported
)


#: What a configuration of each family is compiled for by the inspector.
TARGETS = {
    "sm_80": ("sm_80", "sm_86", "sm_89"), "sm_90": ("sm_90",), "sm_100": ("sm_100",), "sm_120": ("sm_120",),
    "gfx942": ("gfx942",),
}  # fmt: skip


def examples(
    family: str, dtype: torch.dtype, width: int, mask: Mask | None = None, pointers: bool = False
) -> Iterator[triton.Launch]:
    """The launches of a causal call, forward and backward, or of one with the rules of `mask`, without memory.
    pointers: of tensors that can have no descriptor."""
    made: list[triton.Launch] = []
    x = torch.empty(1, 8, 256, width, dtype=dtype, device="meta")
    if pointers:
        x = x[:, :1].expand(-1, 8, -1, -1)
    sums = torch.empty(1, 8, 256, dtype=torch.float64, device="meta")
    rules = (*(mask or Mask(window_right=0)).arguments(), 0.125, False)
    forward(made.append, family, x, x, x, *rules)(x, x, x, *rules)
    args = (x, None, x, x, x, x, sums, *rules, False)
    backward(made.append, family, *args)(*args)
    yield from made


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: causal calls in bfloat16 of heads of 64, 128 and 256."""
    from llmkern.inspect.triton_source import Compilation

    for (name, targets), width, pointers in itertools.product(TARGETS.items(), (64, 128, 256), (False, True)):
        if pointers and name not in DESCRIBED:
            continue
        for launch in examples(name, torch.bfloat16, width, pointers=pointers):
            if pointers and "DESCRIBED" not in launch.constants:
                continue
            tile = f"{launch.constants['BLOCK_M']}x{launch.constants['BLOCK_N']}"
            config = (
                f"bf16, D={width}, {tile}, {launch.options['num_warps']} warps, {launch.options['num_stages']} stages"
            )
            config += ", pointers" if pointers else ""
            yield Compilation.of(launch, config, targets)
