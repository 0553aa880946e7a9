"""The compiled attention kernels as backends: which calls they take, and how the arguments reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.attention import cache
from llmkern.attention.layout import empty_in_order, output_strides
from llmkern.attention.mask import Mask
from llmkern.attention.rows import Rows, bounds, groups
from llmkern.backend import Backend
from llmkern.random import drop_below

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_WIDTH = 576
#: Queries whose weights are in memory at a time where only their sums are asked for.
_ROWS = 256
Strides = tuple[int, int, int, int]


def _unsupported(*tensors: Tensor, rules: Sequence[Any]) -> str | None:
    """rules: what Mask.arguments gives, and what follows."""
    if extension.MISSING is not None:
        return extension.MISSING
    if tensors[0].dtype not in _FLOATS:
        return f"its kernels compute float32, bfloat16 and float16, not {str(tensors[0].dtype).removeprefix('torch.')}"
    width = max(t.shape[-1] for t in tensors)
    if width > _MOST_WIDTH:
        return f"its kernels take heads of width 1 to {_MOST_WIDTH}, not {width}"
    if rules[9] > 0.0 and len(rules) > 11 and rules[11]:
        return "its kernels do not drop weights of rows that attend to all keys alike"
    return None


def _plain(t: Tensor) -> Tensor:
    """The tensor as a kernel reads it: the last dimension contiguous."""
    return t if t.stride(3) == 1 or t.shape[3] <= 1 else t.contiguous()


def _params(
    query: Tensor, key: Tensor, value_width: int, rules: Sequence[Any], *, more: Mapping[str, Tensor | Strides]
) -> Any:
    """What stays the same from call to call; `more` are the kernel's further tensors, or their strides."""
    described, (scale, uniform_empty_rows) = Mask(*rules[:10]), rules[10:]
    mask, key_lengths, slopes = described.dense, described.key_lengths, described.alibi_slopes
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    sizes = [batch, heads, key.shape[1], queries, keys, width, value_width]
    code = extension.DTYPE_CODES[query.dtype]
    params = extension._C.AttentionParams(sizes, scale, uniform_empty_rows, described.bottom_right, code)
    params.window(described.window_left, described.window_right)
    params.softcap(described.softcap)
    if slopes is not None:
        params.alibi(slopes.stride(0) if slopes.dim() == 2 else 0, slopes.stride(-1))
    if described.dropout_p > 0.0 and value_width:
        keep = 0.0 if described.dropout_p >= 1.0 else 1.0 / (1.0 - described.dropout_p)
        params.dropout(drop_below(described.dropout_p), keep)
    if mask is not None:
        strides = mask.expand(batch, heads, queries, keys).stride()
        params.mask(extension.DTYPE_CODES[mask.dtype], list(strides))
    if key_lengths is not None:
        params.lengths(key_lengths.dtype == torch.int64, key_lengths.stride(0))
    for name, t in {"query": query, "key": key, **more}.items():
        getattr(params, name)(*(t.stride() if isinstance(t, Tensor) else t)[:3])
    return params


def _sink(sink: Tensor | None) -> Tensor | None:
    """As the kernels read it."""
    return None if sink is None else sink.float().contiguous()


def _forward(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    if any(_plain(t) is not t for t in (query, key, value)):
        return _through_copies(_forward, 3)
    shape, strides = (*query.shape[:3], value.shape[3]), output_strides(query, value.shape[3])
    params = _params(query, key, value.shape[3], rules, more={"value": value, "output": strides})
    kernel, threads, dtype, rows = extension._C.attention_forward, extension.threads, query.dtype, shape[:3]

    def launch(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_lengths: Tensor | None,
        slopes: Tensor | None, sink: Tensor | None, seed: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output = torch.empty_strided(shape, strides, dtype=dtype)
        logsumexp = torch.empty(rows, dtype=torch.float64)
        tensors = (mask, key_lengths, logsumexp, None, slopes, _sink(sink), seed, query, key, value, output)
        kernel(params, threads(), *tensors)
        return output, logsumexp

    return launch


def _backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    if any(_plain(t) is not t for t in (grad_output, query, key, value, output)):
        return _through_copies(_backward, 6)
    *rules, mask_grad = rest
    width = value.shape[3]
    more: dict[str, Tensor | Strides] = {
        "value": value,
        "output": output,
        "grad_output": grad_output,
        "dquery": output_strides(query, query.shape[3]),
        "dkey": output_strides(key, key.shape[3]),
        "dvalue": output_strides(value, width),
    }
    params = _params(query, key, width, rules, more=more)
    kernel, threads = extension._C.attention_backward, extension.threads

    def launch(
        grad_output: Tensor, grad_logsumexp: None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        logsumexp: Tensor, mask: Tensor | None, key_lengths: Tensor | None, slopes: Tensor | None,
        sink: Tensor | None, seed: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads = [empty_in_order(t, t.shape[3]) for t in (query, key, value)]
        logsumexp = logsumexp.contiguous()
        grad_scores = _grad_scores(query, key, mask_grad and mask is not None)
        tensors = (query, key, value, output, grad_output, *grads)
        kernel(params, threads(), mask, key_lengths, logsumexp, grad_scores, slopes, _sink(sink), seed, *tensors)
        return *grads, _mask_grad(query, mask, grad_scores), _sink_grad(sink, grad_output, output, logsumexp)

    return launch


def _weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Callable[..., Tensor]:
    if any(_plain(t) is not t for t in (query, key)):
        return _through_copies(_weights, 2)
    shape = (*query.shape[:3], key.shape[2])
    like = torch.empty(shape, dtype=query.dtype, device="meta")
    params = _params(query, key, 0, rules, more={"weights": like})
    kernel, threads = extension._C.attention_weights, extension.threads

    def launch(
        query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None, key_lengths: Tensor | None,
        slopes: Tensor | None, sink: Tensor | None, *rest: Any,
    ) -> Tensor:  # fmt: skip
        weights = query.new_empty(shape)
        logsumexp = logsumexp.contiguous()
        tensors = (mask, key_lengths, logsumexp, None, slopes, _sink(sink), None, query, key, weights)
        kernel(params, threads(), *tensors)
        return weights

    return launch


def _weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> Callable[..., tuple[Tensor, ...]]:
    if any(_plain(t) is not t for t in (grad_weights, query, key)):
        return _through_copies(_weights_backward, 3)
    *rules, mask_grad = rest
    more: dict[str, Tensor | Strides] = {
        "weights": grad_weights,
        "dquery": output_strides(query, query.shape[3]),
        "dkey": output_strides(key, key.shape[3]),
    }
    params = _params(query, key, 0, rules, more=more)
    kernel, threads = extension._C.attention_weights_backward, extension.threads

    def launch(
        grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None,
        key_lengths: Tensor | None, slopes: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads = [empty_in_order(t, t.shape[3]) for t in (query, key)]
        logsumexp = logsumexp.contiguous()
        grad_scores = _grad_scores(query, key, mask_grad and mask is not None)
        tensors = (query, key, grad_weights, *grads)
        kernel(params, threads(), mask, key_lengths, logsumexp, grad_scores, slopes, None, None, *tensors)
        return *grads, _mask_grad(query, mask, grad_scores), query.new_empty(0, dtype=torch.float32)

    return launch


def _column_sums(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Callable[..., Tensor]:
    """The kernel of the weights on some queries at a time, which a dense mask tells where they stand."""
    queries, keys = query.shape[2], key.shape[2]

    def launch(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Tensor:
        mask = Mask(*rules[:10])
        sums = query.new_zeros((*query.shape[:2], keys), dtype=torch.float32)
        for start in range(0, queries, _ROWS):
            rows = slice(start, start + _ROWS)
            dense = Mask(_dense(mask, queries, keys, rows), softcap=mask.softcap)
            args = (query[:, :, rows], key, logsumexp[:, :, rows], *dense.arguments(), *rules[10:])
            sums += _weights(*args)(*args).sum(2, dtype=torch.float32)
        return sums

    return launch


def _dense(mask: Mask, queries: int, keys: int, rows: slice) -> Tensor | None:
    """All that is added to the scores of some rows, and all that is masked, as one dense mask."""
    where = (queries, keys, torch.device("cpu"), rows)
    seen, added, bias = mask.seen(*where), mask.additive, mask.distance_bias(*where)
    if added is not None and added.size(2) > 1:
        added = added[:, :, rows]
    if bias is not None:
        added = bias if added is None else bias + added
    if seen is not None and added is not None:
        seen = torch.where(seen, added, -torch.inf)
    found = added if seen is None else seen
    return None if found is None else found[(None,) * (4 - found.dim())]


def _kvcache(*args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel on the cache as it lies, or on a dense copy of what is paged or int8."""

    def launch(*args: Any) -> tuple[Tensor, Tensor]:
        output, logsumexp = cache.attend(lambda *dense: _forward(*dense)(*dense), *args)
        return output.contiguous(), logsumexp

    return launch


def _unsupported_kvcache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None, value: Tensor | None, *rest: Any
) -> str | None:
    *_, slopes, sink, left, right, softcap, _, _ = rest
    mask = Mask(None, None, slopes, sink, None, left, right, True, softcap)
    return _unsupported(query, v_cache, rules=mask.arguments())


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest_q: int | None,
    longest_k: int | None, *rules: Any,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """The kernel on padded batches of the sequences. Queries are aligned to the corner that their places count from."""

    def launch(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        output = query.new_empty((*query.shape[:2], value.shape[2]))
        logsumexp = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float64)
        for q, k, alone in _batches(query, key, rest):
            args = (q.batch(query), k.batch(key), k.batch(value), *alone)
            found, sums = _forward(*args)(*args)
            output[q.tokens], logsumexp[:, q.tokens] = q.packed(found), q.packed_rows(sums)
        return output, logsumexp

    return launch


def _varlen_backward(*args: Any) -> Callable[..., tuple[Tensor, ...]]:
    def launch(
        grad_output: Tensor, grad_logsumexp: None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        logsumexp: Tensor, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads, sink_grad = [t.new_empty(t.shape) for t in (query, key, value)], None
        for q, k, alone in _batches(query, key, rest):
            tensors = (q.batch(query), k.batch(key), k.batch(value), q.batch(output), q.batch_of_rows(logsumexp))
            args = (q.batch(grad_output), None, *tensors, *alone, False)
            *found, _, of_sink = _backward(*args)(*args)
            for grad, rows, part in zip(grads, (q, k, k), found, strict=True):
                grad[rows.tokens] = rows.packed(part)
            sink_grad = of_sink if sink_grad is None else sink_grad + of_sink
        if sink_grad is None:  # no sequence
            sink_grad = query.new_zeros(0 if rest[5] is None else rest[5].shape, dtype=torch.float32)
        return *grads, sink_grad

    return launch


def _batches(query: Tensor, key: Tensor, rest: Sequence[Any]) -> Iterator[tuple[Rows, Rows, tuple[Any, ...]]]:
    """Rows of queries, rows of keys, and the dense operators' rules, for each batch that the sequences make."""
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, *rules = rest
    queries = bounds("q", cu_seqlens_q, query.shape[0], longest_q)
    keys = bounds("k", cu_seqlens_k, key.shape[0], longest_k)
    for first, past in groups(queries, keys):
        q, k = Rows(queries[first : past + 1], at_end=rules[5]), Rows(keys[first : past + 1])
        slopes, *others = rules
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[first:past]
        yield q, k, (None, k.lengths, slopes, *others, False)


def _through_copies(plan: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A launcher for tensors whose last dimension is not contiguous: the first `count` arguments are made so."""

    def launch(*args: Any) -> Any:
        args = (*(t if t is None else _plain(t) for t in args[:count]), *args[count:])
        return plan(*args)(*args)

    return launch


def _grad_scores(query: Tensor, key: Tensor, wanted: bool) -> Tensor | None:
    """The gradient of the scaled scores, (B, H, Sq, Sk) float32, for the kernel to fill where a query sees a key."""
    return query.new_zeros((*query.shape[:3], key.shape[2]), dtype=torch.float32) if wanted else None


def _sink_grad(sink: Tensor | None, grad_output: Tensor, output: Tensor, logsumexp: Tensor) -> Tensor:
    """A sink's logit takes from every row its own weight times what the row's values give."""
    if sink is None:
        return output.new_empty(0, dtype=torch.float32)
    given = (grad_output.double() * output.double()).sum(-1)
    weight = torch.exp(sink.double()[:, None] - logsumexp).nan_to_num(0.0)
    return -(weight * given).sum((0, 2)).float()


def _mask_grad(query: Tensor, mask: Tensor | None, grad_scores: Tensor | None) -> Tensor:
    if grad_scores is None or mask is None:
        return query.new_empty(0, dtype=torch.float32)
    return grad_scores.sum_to_size(mask.shape).contiguous()


def _unsupported_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> str | None:  # fmt: skip
    if grad_logsumexp is not None and extension.MISSING is None:
        return "its kernels take no gradient of the log-sum-exp yet"
    return _unsupported(query, key, value, rules=rest)


def _unsupported_weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> str | None:
    if rest[3] is not None and extension.MISSING is None:
        return "its kernel of the weights' gradients has none of an attention sink yet"
    return _unsupported(query, key, rules=rest)


def _unsupported_varlen(*tensors: Tensor, rules: Sequence[Any]) -> str | None:
    if rules[7] > 0.0 and extension.MISSING is None:  # dropout_p
        return "its kernels drop no weights of sequences laid end to end yet"
    return _unsupported(*tensors, rules=(None, None, *rules, False))


CPU_ATTENTION = Backend("cpu", _forward, lambda query, key, value, *rest: _unsupported(query, key, value, rules=rest))
CPU_ATTENTION_BACKWARD = Backend("cpu", _backward, _unsupported_backward)
CPU_ATTENTION_WEIGHTS = Backend(
    "cpu", _weights, lambda query, key, logsumexp, *rest: _unsupported(query, key, rules=rest)
)
CPU_ATTENTION_WEIGHTS_BACKWARD = Backend("cpu", _weights_backward, _unsupported_weights_backward)
CPU_VARLEN = Backend(
    "cpu",
    _varlen,
    lambda query, key, value, cu_q, cu_k, longest_q, longest_k, *rest: _unsupported_varlen(
        query, key, value, rules=rest
    ),
)
CPU_VARLEN_BACKWARD = Backend(
    "cpu",
    _varlen_backward,
    lambda grad, grad_sums, query, key, value, output, sums, cu_q, cu_k, longest_q, longest_k, *rest: (
        "its kernels take no gradient of the log-sum-exp yet"
        if grad_sums is not None and extension.MISSING is None
        else _unsupported_varlen(query, key, value, rules=rest)
    ),
)
CPU_KVCACHE = Backend("cpu", _kvcache, _unsupported_kvcache)
CPU_COLUMN_SUMS = Backend(
    "cpu", _column_sums, lambda query, key, logsumexp, *rest: _unsupported(query, key, rules=rest)
)
