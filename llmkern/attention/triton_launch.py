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
from llmkern.attention.compiled.params import plain, through_copies
from llmkern.attention.mask import Mask
from llmkern.attention.triton_call import WIDEST, Call, may_describe, options
from llmkern.attention.triton_configurations import DESCRIBED, FEW_KEYS, FEW_QUERIES, configuration, family
from llmkern.attention.triton_mask_launch import MaskTiles
from llmkern.backend import Backend

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

#: Queries and keys are numbered in 32 bits, with room for the sum of a place and a window.
_MOST_ROWS = 2**28
#: Offsets within a tile, of at most 256 rows or columns, have 32 bits.
_MOST_APART = 2**23

_FORWARD, *_GRADIENTS = (
    f"llmkern.attention.triton_{name}" for name in ("forward", "backward", "backward_queries", "backward_keys")
)
_BACKWARD = dict(zip(("statistics", "queries", "keys"), _GRADIENTS, strict=True))


def family_of(device: torch.device) -> str:
    return family(None if torch.version.hip else torch.cuda.get_device_capability(device))


def forward(
    run: triton.Run, family: str, query: Tensor, key: Tensor, value: Tensor, *rules: Any, sequences: int | None = None
) -> Callable[..., Any]:  # fmt: skip
    """The launcher of all calls with these metadata, by `run` with the configurations of `family`.

    sequences: how many of them lie end to end in the one batch of the tensors; their bounds go to the launcher.
    """
    if any(plain(t) is not t for t in (query, key, value)):
        return through_copies(lambda *args: forward(run, family, *args), 3)
    call = Call(query, key, value, rules, sequences)
    may, tiled = may_describe(family, call, key, value), MaskTiles(run, call, rules[0])
    whole = sequences is None
    tiles = {d: configuration("forward", family, query.element_size(), *call.shape, d, whole) for d in {False, may}}

    def launch(
        query: Tensor, key: Tensor, value: Tensor, *rules: Any, bounds: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        output = call.empty(query, value.size(3))
        logsumexp = torch.empty(query.shape[:3], dtype=torch.float64, device=query.device)
        described = may and triton.aligned(key, value)
        tile = tiles[described]
        programs = call.programs(call.heads, call.queries, tile.queries)
        if programs:
            arguments = (
                query, key, value, *call.descriptors(described, tile.keys, key, value), output, logsumexp,
                tiled.make(rules[0], query), *call.tensors(query, rules), *call.numbers,
                *call.strides(query, key, value, output), *call.dense_steps, *call.steps, *tiled.steps,
                *call.bounds(query, bounds),
            )  # fmt: skip
            constants = {**call.constants(tile, query.dtype, family), "TILED": tiled.wanted, "DESCRIBED": described}
            run(triton.Launch(
                _FORWARD, "attention_forward_kernel", (programs,), arguments, constants, options(tile),
                ("output", "logsumexp"),
            ))  # fmt: skip
        return output, logsumexp

    return launch


def from_weights(query: Tensor, key: Tensor, call: Call, mask_grad: bool) -> bool:
    """Whether delta is summed over the weights themselves and not made of the rounded output: where the rounding of
    the output would be seen in a sum of the scores' gradients, and where it costs next to nothing. (Of sequences end
    to end the kernels look at the lengths of each.)"""
    seen = mask_grad or call.rules["SINK"] or call.rules["SOFTCAP"]
    if call.sequences is not None:
        return bool(seen)
    return bool(seen or key.size(2) <= FEW_KEYS or query.size(2) <= FEW_QUERIES)


def backward(
    run: triton.Run, family: str, grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, output: Tensor, logsumexp: Tensor, *rest: Any, sequences: int | None = None,
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    """As `forward`, for the gradients."""
    if any(plain(t) is not t for t in (grad_output, query, key, value, output)):
        return through_copies(lambda *args: backward(run, family, *args), 6)
    *rules, mask_grad = rest
    mask_grad = bool(mask_grad and rules[0] is not None)
    call = Call(query, key, value, rules, sequences)
    may = {"queries": may_describe(family, call, key, value), "keys": may_describe(family, call, query, grad_output)}
    tiles = {
        (k, d): configuration(k, family, query.element_size(), *call.shape, d, sequences is None)
        for k in _BACKWARD for d in {False, may.get(k, False)}
    }  # fmt: skip
    tiled = MaskTiles(run, call, rules[0], mask_grad)
    added = {"ADDED": grad_logsumexp is not None, "TILED": tiled.wanted}
    weighed = from_weights(query, key, call, mask_grad)

    def launch(
        grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        logsumexp: Tensor, *rest: Any, bounds: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dquery, dkey, dvalue = (call.empty(t, t.size(3)) for t in (query, key, value))
        mask, sink = rest[0], rest[3]
        grad_scores = empty_grad_scores(query, key, mask_grad)
        statistics = torch.empty((4, *query.shape[:3]), dtype=torch.float32, device=query.device)
        logsumexp, of_sums = logsumexp.contiguous(), as_rows(grad_logsumexp)
        tensors = (tiled.make(mask, query), *call.tensors(query, rest))
        numbers = (statistics[0].numel(), *call.numbers)

        def launch_one(
            which: str, name: str, before: Sequence[Tensor], after: Sequence[Tensor], strides: Sequence[Tensor],
            written: tuple[str, ...], read: Sequence[Tensor] = (), **constants: bool,
        ) -> None:  # fmt: skip
            """read: what goes by in blocks, through descriptors where it can."""
            described = may.get(which, False) and triton.aligned(*read)
            tile = tiles[which, described]
            if which == "keys":
                programs, block = call.programs(call.kv_heads, call.keys, tile.keys), tile.queries
            else:
                programs, block = call.programs(call.heads, call.queries, tile.queries), tile.keys
            if not programs:
                return
            if read:
                constants["DESCRIBED"] = described
            steps = (*call.strides(*strides), *call.dense_steps, *call.steps, *tiled.steps)
            rows_of = call.descriptors(described, block, *read)
            arguments = (*before, *rows_of, *after, *tensors, *numbers, *steps, *call.bounds(query, bounds))
            made = {**call.constants(tile, query.dtype, family), **added, **constants}
            changed = ("grad_scores",) if constants.get("MASK_GRAD") else ()
            run(triton.Launch(
                _BACKWARD[which], name, (programs,), arguments, made, options(tile), written, changed,
            ))  # fmt: skip

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
        launch_one(
            "keys", "attention_backward_key_kernel", (query, key, value, grad_output), (statistics, dkey, dvalue),
            (query, key, value, grad_output, dkey, dvalue), ("grad_key", "grad_value"), (query, grad_output),
        )  # fmt: skip
        of_sink = sink_grad(sink, statistics[2], logsumexp, of_sums)
        return dquery, dkey, dvalue, mask_grad_of(query, mask, grad_scores), of_sink

    return launch


def limits(query: Tensor, key: Tensor, value: Tensor, rules: Sequence[Any], *others: Tensor) -> str | None:
    """Why the kernels cannot take tensors (B, H, S, D) of these shapes, wherever they are. others: read by rows too."""
    width = max(query.shape[-1], value.shape[-1])
    if width > WIDEST:
        return f"its kernels take heads of width 0 to {WIDEST}, not {width}"
    rows = max(query.shape[2], key.shape[2])
    if rows > _MOST_ROWS:
        return f"its kernels take up to 2^28 queries and keys, not {rows}"
    if math.prod(query.shape[:2]) * -(-rows // 16) >= 2**31:
        return f"its kernels take fewer than 2^31 tiles of 16 rows, not {tuple(query.shape[:3])}"
    apart = max(t.stride(2) if t.stride(-1) == 1 else t.shape[-1] for t in (query, key, value, *others))
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
    return unsupported(query) or limits(query, key, value, rest, grad_output, output)


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


#: The masks that the inspector looks at, by width of the heads.
MASKED = {64: torch.bool, 128: torch.bfloat16, 256: torch.bool}


def label(launch: triton.Launch, width: int) -> str:
    """What the inspector calls the configuration of a launch in bfloat16."""
    tile = f"{launch.constants['BLOCK_M']}x{launch.constants['BLOCK_N']}"
    return f"bf16, D={width}, {tile}, {launch.options['num_warps']} warps, {launch.options['num_stages']} stages"


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: causal calls in bfloat16 of heads of 64, 128 and 256, and with masks,
    boolean and added."""
    from llmkern.inspect.triton_source import Compilation

    for (name, targets), (width, dtype) in itertools.product(TARGETS.items(), MASKED.items()):
        masked = Mask(torch.empty(1, 1, 256, 256, dtype=dtype, device="meta"), window_right=0)
        for launch in examples(name, torch.bfloat16, width, masked):
            if "TILED" in launch.constants and "DESCRIBED" in launch.constants:
                yield Compilation.of(launch, f"{label(launch, width)}, mask", targets)
    for (name, targets), width, pointers in itertools.product(TARGETS.items(), (64, 128, 256), (False, True)):
        if pointers and name not in DESCRIBED:
            continue
        for launch in examples(name, torch.bfloat16, width, pointers=pointers):
            if pointers and "DESCRIBED" not in launch.constants:
                continue
            yield Compilation.of(launch, label(launch, width) + (", pointers" if pointers else ""), targets)
