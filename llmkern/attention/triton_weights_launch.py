"""Triton's attention weights, their gradients and their column sums as backends.

Triton is imported when a call comes, never with the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern import triton
from llmkern.attention.compiled.dense import empty_grad_scores, mask_grad_of, sink_grad
from llmkern.attention.compiled.params import plain, through_copies
from llmkern.attention.mask import Mask
from llmkern.attention.triton_call import Call, options
from llmkern.attention.triton_configurations import configuration
from llmkern.attention.triton_launch import TARGETS, family_of, label, limits, unsupported
from llmkern.backend import Backend

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

_MODULE = "llmkern.attention.triton_weights"
#: Tiles of keys whose weights a program writes, so that few queries have many programs, and read their queries once.
_TILES = 8


def weights(run: triton.Run, family: str, query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Any:
    """The launcher of all calls with these metadata, by `run` with the configurations of `family`."""
    if any(plain(t) is not t for t in (query, key)):
        return through_copies(lambda *args: weights(run, family, *args), 2)
    call = Call(query, key, key, rules)
    tile = configuration("forward", family, query.element_size(), *call.shape, own=False)
    programs = call.programs(call.heads, call.queries, tile.queries) * -(-call.keys // (_TILES * tile.keys))

    def launch(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Tensor:
        made = query.new_empty((*query.shape[:3], key.size(2)))
        if programs:
            arguments = (
                query, key, logsumexp.contiguous(), made, *call.tensors(query, rules), *call.numbers,
                *call.strides(query, key), key.size(2), *call.dense_steps, *call.steps,
            )  # fmt: skip
            run(triton.Launch(
                _MODULE, "attention_weights_kernel", (programs,), arguments,
                {**call.constants(tile, query.dtype, family), "TILES": _TILES}, options(tile), ("weights",),
            ))  # fmt: skip
        return made

    return launch


def column_sums(
    run: triton.Run, family: str, query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any
) -> Callable[..., Tensor]:
    """As `weights`, for their sums over the queries."""
    if any(plain(t) is not t for t in (query, key)):
        return through_copies(lambda *args: column_sums(run, family, *args), 2)
    call = Call(query, key, key, rules)
    # Queries in stages of the forward's tiles would not fit into the 64 KB of AMD's blocks.
    table = "keys" if family.startswith("gfx") else "forward"
    tile = configuration(table, family, query.element_size(), *call.shape, own=False)
    programs = call.programs(call.heads, call.keys, tile.keys)

    def launch(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Tensor:
        sums = torch.empty((*query.shape[:2], key.size(2)), dtype=torch.float32, device=query.device)
        if programs:
            arguments = (
                query, key, logsumexp.contiguous(), sums, *call.tensors(query, rules), *call.numbers,
                *call.strides(query, key), *call.dense_steps, *call.steps,
            )  # fmt: skip
            run(triton.Launch(
                _MODULE, "attention_column_sums_kernel", (programs,), arguments,
                call.constants(tile, query.dtype, family), options(tile), ("sums",),
            ))  # fmt: skip
        return sums

    return launch


def backward(
    run: triton.Run, family: str, grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> Callable[..., tuple[Tensor, ...]]:
    """As `weights`, for their gradients."""
    if any(plain(t) is not t for t in (grad_weights, query, key)):
        return through_copies(lambda *args: backward(run, family, *args), 3)
    *rules, mask_grad = rest
    mask_grad = bool(mask_grad and rules[0] is not None)
    call = Call(query, key, key, rules)
    tiles = {k: configuration(k, family, query.element_size(), *call.shape, own=False) for k in ("queries", "keys")}
    programs = {
        "queries": call.programs(call.heads, call.queries, tiles["queries"].queries),
        "keys": call.programs(call.kv_heads, call.keys, tiles["keys"].keys),
    }

    def launch(grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        dquery, dkey = (call.empty(t, t.size(3)) for t in (query, key))
        mask, sink = rest[0], rest[3]
        grad_scores = empty_grad_scores(query, key, mask_grad)
        deltas = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        logsumexp = logsumexp.contiguous()
        rules = (*call.tensors(query, rest), *call.numbers)

        def launch_one(which: str, tensors: Sequence[Tensor], grad: Tensor, **more: Any) -> None:
            steps = (*call.strides(query, key, grad_weights, grad), *call.dense_steps, *call.steps)
            constants = call.constants(tiles[which], query.dtype, family)
            written, changed = more.pop("written"), ("grad_scores",) if more.get("MASK_GRAD") else ()
            run(triton.Launch(
                f"{_MODULE}_backward", more.pop("kernel"), (programs[which],), (*tensors, *rules, *steps),
                {**constants, **more}, options(tiles[which]), written, changed,
            ))  # fmt: skip

        if programs["queries"]:
            launch_one(
                "queries",
                (query, key, grad_weights, logsumexp, dquery, deltas, query if grad_scores is None else grad_scores),
                dquery, kernel="attention_weights_query_kernel", written=("grad_query", "deltas"), MASK_GRAD=mask_grad,
            )  # fmt: skip
        if programs["keys"]:
            launch_one(
                "keys", (query, key, grad_weights, logsumexp, deltas, dkey), dkey,
                kernel="attention_weights_key_kernel", written=("grad_key",),
            )  # fmt: skip
        return dquery, dkey, mask_grad_of(query, mask, grad_scores), sink_grad(sink, deltas, logsumexp, None)

    return launch


def _weights_limits(query: Tensor, key: Tensor, rules: Sequence[Any]) -> str | None:
    tiles = query.shape[0] * query.shape[1] * -(-query.shape[2] // 16) * -(-key.shape[2] // (16 * _TILES))
    if tiles >= 2**31:
        return f"its kernel writes fewer than 2^31 tiles of 16 rows and {16 * _TILES} keys"
    return limits(query, key, key, rules)


TRITON_WEIGHTS = Backend(
    "triton",
    lambda query, *args: weights(triton.run, family_of(query.device), query, *args),
    lambda query, key, logsumexp, *rules: unsupported(query) or _weights_limits(query, key, rules),
)
TRITON_COLUMN_SUMS = Backend(
    "triton",
    lambda query, *args: column_sums(triton.run, family_of(query.device), query, *args),
    lambda query, key, logsumexp, *rules: unsupported(query) or limits(query, key, key, rules),
)

TRITON_WEIGHTS_BACKWARD = Backend(
    "triton",
    lambda grad, *args: backward(triton.run, family_of(grad.device), grad, *args),
    lambda grad, query, key, logsumexp, *rest: unsupported(query) or limits(query, key, key, rest, grad),
)


def examples(family: str, dtype: torch.dtype, width: int) -> Iterator[triton.Launch]:
    """The launches of causal calls, with the gradients of the weights, without memory."""
    made: list[triton.Launch] = []
    x = torch.empty(1, 8, 256, width, dtype=dtype, device="meta")
    args = (x, x, torch.empty(1, 8, 256, dtype=torch.float64, device="meta"))
    rules = (*Mask(window_right=0).arguments(), 0.125, False)
    for plan in (weights, column_sums):
        plan(made.append, family, *args, *rules)(*args, *rules)
    grad = torch.empty(1, 8, 256, 256, dtype=dtype, device="meta")
    backward(made.append, family, grad, *args, *rules, False)(grad, *args, *rules, False)
    yield from made


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: causal calls in bfloat16 of heads of 64, 128 and 256."""
    from llmkern.inspect.triton_source import Compilation

    for (name, targets), width in itertools.product(TARGETS.items(), (64, 128, 256)):
        for launch in examples(name, torch.bfloat16, width):
            yield Compilation.of(launch, label(launch, width), targets)
