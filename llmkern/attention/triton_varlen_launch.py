"""Triton's attention of sequences laid end to end, as backends: the dense kernels, told where each sequence lies.

The bounds stay on the device: a launch neither waits for them nor looks at them, so that it can be part of a CUDA
graph. Bounds that are none give wrong results, and reach nothing outside of the tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern import triton
from llmkern.attention import triton_launch
from llmkern.attention.compiled.params import plain, through_copies
from llmkern.attention.mask import Mask
from llmkern.attention.triton_launch import TARGETS, family_of, unsupported
from llmkern.backend import Backend

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation


def _batch(t: Tensor) -> Tensor:
    """(1, H, T, D) of (T, H, D)."""
    return t.transpose(0, 1).unsqueeze(0)


def _tokens(t: Tensor) -> Tensor:
    return t[0].transpose(0, 1)


def _rules(rules: Sequence[Any]) -> tuple[Any, ...]:
    """Those of the dense operators: without a mask, lengths and rows that attend to all alike."""
    return None, None, *rules, False


def forward(
    run: triton.Run, family: str, query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    longest_q: int | None, longest_k: int | None, *rules: Any,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """The launcher of all calls with these metadata, by `run` with the configurations of `family`."""
    if any(plain(t) is not t for t in (query, key, value, cu_seqlens_q, cu_seqlens_k)):
        return through_copies(lambda *args: forward(run, family, *args), 5)
    sequences = cu_seqlens_q.shape[0] - 1
    dense = triton_launch.forward(
        run, family, *map(_batch, (query, key, value)), *_rules(rules), sequences=sequences
    )  # fmt: skip

    def launch(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest_q: int | None,
        longest_k: int | None, *rules: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tensors, bounds = map(_batch, (query, key, value)), (cu_seqlens_q, cu_seqlens_k)
        output, logsumexp = dense(*tensors, *_rules(rules), bounds=bounds)
        return _tokens(output), logsumexp[0]

    return launch


def backward(
    run: triton.Run, family: str, grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, output: Tensor, logsumexp: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    longest_q: int | None, longest_k: int | None, *rules: Any,
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    """As `forward`, for the gradients."""
    if any(plain(t) is not t for t in (grad_output, query, key, value, output, cu_seqlens_q, cu_seqlens_k)):
        return through_copies(lambda *args: backward(run, family, *args), 9)

    def dense_arguments(
        grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        logsumexp: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest_q: int | None, longest_k: int | None,
        *rules: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        of_sums = None if grad_logsumexp is None else grad_logsumexp.unsqueeze(0)
        tensors = (_batch(t) for t in (query, key, value, output))
        return _batch(grad_output), of_sums, *tensors, logsumexp.unsqueeze(0), *_rules(rules), False

    args = (
        grad_output, grad_logsumexp, query, key, value, output, logsumexp, cu_seqlens_q, cu_seqlens_k, longest_q,
        longest_k, *rules,
    )  # fmt: skip
    dense = triton_launch.backward(run, family, *dense_arguments(*args), sequences=cu_seqlens_q.shape[0] - 1)

    def launch(*args: Any) -> tuple[Tensor, ...]:
        *grads, _, of_sink = dense(*dense_arguments(*args), bounds=args[7:9])
        return *map(_tokens, grads), of_sink

    return launch


def limits(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, rules: Sequence[Any], *others: Tensor
) -> str | None:
    """Why the kernels cannot take tensors (T, H, D) of these shapes, wherever they are. others: read by rows too."""
    sequences, rows = cu_seqlens.shape[0] - 1, max(query.shape[0], key.shape[0])
    if not sequences and rows:
        return "there are tokens but no sequences"
    if query.shape[1] * (rows // 16 + sequences + 1) >= 2**31:
        return f"its kernels take fewer than 2^31 tiles of 16 rows, not those of {sequences} sequences of {rows} tokens"
    return triton_launch.limits(_batch(query), _batch(key), _batch(value), _rules(rules), *map(_batch, others))


def _unsupported(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, *rest: Any) -> str | None:
    return unsupported(query) or limits(query, key, value, cu_seqlens_q, rest[3:])


def _backward_unsupported(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, cu_seqlens_q: Tensor, *rest: Any,
) -> str | None:  # fmt: skip
    return unsupported(query) or limits(query, key, value, cu_seqlens_q, rest[3:], grad_output, output)


TRITON_VARLEN = Backend(
    "triton", lambda query, *args: forward(triton.run, family_of(query.device), query, *args), _unsupported
)
TRITON_VARLEN_BACKWARD = Backend(
    "triton", lambda grad, *args: backward(triton.run, family_of(grad.device), grad, *args), _backward_unsupported
)


def examples(family: str, dtype: torch.dtype, width: int) -> Iterator[triton.Launch]:
    """The launches of a causal call, forward and backward, without memory."""
    made: list[triton.Launch] = []
    x = torch.empty(256, 8, width, dtype=dtype, device="meta")
    sums = torch.empty(8, 256, dtype=torch.float64, device="meta")
    ends = torch.empty(5, dtype=torch.int32, device="meta")
    rest = (ends, ends, None, None, *Mask(window_right=0).arguments()[2:], 0.125)
    forward(made.append, family, x, x, x, *rest)(x, x, x, *rest)
    args = (x, None, x, x, x, x, sums, *rest)
    backward(made.append, family, *args)(*args)
    yield from made


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: causal calls in bfloat16 of heads of 64, 128 and 256."""
    from llmkern.inspect.triton_source import Compilation

    for (name, targets), width in itertools.product(TARGETS.items(), (64, 128, 256)):
        for launch in examples(name, torch.bfloat16, width):
            yield Compilation.of(launch, f"{triton_launch.label(launch, width)}, packed", targets)
