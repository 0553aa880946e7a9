"""DTensor rules: how torch.ops.llmkern's operators run on tensors that several processes share.

`register()` once, and norms, gated activations, rotary positions, attention, int8 linear layers and losses take
DTensors: each process runs its kernel on its own part, and no part is gathered where the rule of a dimension does not
ask for it. All tensors of a call must be DTensors then. A rule lists, for one dimension of the mesh, the placements of
results and arguments that go together; torch chooses the cheapest for what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from llmkern.activation.op import gated  # noqa: F401  (operators must be declared before they have rules)
from llmkern.attention.op import attention, attention_varlen  # noqa: F401
from llmkern.int8.op import int8_linear  # noqa: F401
from llmkern.loss.op import cross_entropy, distillation  # noqa: F401
from llmkern.norm.op import layer_norm  # noqa: F401
from llmkern.positional.op import rotary  # noqa: F401

Placements = list[Placement | None]
Choice = tuple[Placements, Placements]


def _is_tensor(argument: Any) -> bool:
    return hasattr(argument, "placements")


def _choice(results: Iterable[Placement], given: dict[int, Placement], args: tuple[Any, ...]) -> Choice:
    """given: the placements of arguments by place; other tensors are whole, and what is no tensor has none."""
    return list(results), [given.get(i, Replicate()) if _is_tensor(a) else None for i, a in enumerate(args)]


def _whole(results: int, args: tuple[Any, ...]) -> Choice:
    return _choice([Replicate()] * results, {}, args)


def _norm(*args: Any) -> list[Choice]:
    """x, residual, weight, bias, ... -> out, total, statistics: rows are alone, so that any dimension but the last is
    split. Without a residual the total is empty."""
    found = [_whole(3, args)]
    for d in range(args[0].ndim - 1):
        total = Shard(d) if _is_tensor(args[1]) else Replicate()
        found.append(_choice([Shard(d), total, Shard(d)], {0: Shard(d), 1: Shard(d)}, args))
    return found


def _norm_backward(*args: Any) -> list[Choice]:
    """grad, grad_total, total, weight, statistics, ..., with_bias -> those of x, weight and bias, the last two sums
    over rows."""
    found = [_whole(3, args)]
    for d in range(args[2].ndim - 1):
        sums = [Partial() if wanted else Replicate() for wanted in (_is_tensor(args[3]), args[8])]
        found.append(_choice([Shard(d), *sums], {i: Shard(d) for i in (0, 1, 2, 4)}, args))
    return found


def _elementwise(results: int, tensors: int) -> Callable[..., list[Choice]]:
    """Every dimension of tensors of one shape may be split."""

    def rule(*args: Any) -> list[Choice]:
        shards = [Shard(d) for d in range(args[0].ndim)]
        return [
            _whole(results, args),
            *(_choice([s] * results, dict.fromkeys(range(tensors), s), args) for s in shards),
        ]

    return rule


def _rotary(*args: Any) -> list[Choice]:
    """q, k, cos, sin, position_ids, ... -> q, k: batch and heads are split, the sequence where it has position_ids."""
    found = [_whole(2, args)]
    positions = args[4]
    for d in (0, 1, 2):
        given: dict[int, Placement] = {0: Shard(d), 1: Shard(d)}
        if d == 2 and not _is_tensor(positions):
            continue
        if _is_tensor(positions) and (d == 2 or (d == 0 and positions.ndim == 2)):
            given[4] = Shard(positions.ndim - 1 if d == 2 else 0)
        found.append(_choice([Shard(d), Shard(d) if _is_tensor(args[1]) else Replicate()], given, args))
    return found


def _heads_divide(query: Any, key: Any, dimension: int) -> bool:
    """Whether every process gets whole groups of query heads with the key heads that they share."""
    size = query.mesh.size()
    return query.shape[dimension] == key.shape[dimension] or (
        query.shape[dimension] % size == 0 and key.shape[dimension] % size == 0
    )


#: The rules' places behind query, key and value, or behind the log-sum-exp: mask, key_lengths, alibi_slopes,
#: learnable_sink, dropout_seed (llmkern.attention.mask.RULES).
def _attention_rules(args: tuple[Any, ...], first: int, query: Any, key: Any) -> list[tuple[int, dict[int, Placement]]]:
    """The dimensions of (B, H, S, D) that may be split, with the placements of the rules' tensors for each."""
    mask, lengths, slopes, sink, seed = args[first : first + 5]
    found: list[tuple[int, dict[int, Placement]]] = []
    if _is_tensor(seed):  # dropout's numbers are of a weight's place in the whole
        return found
    for d in (0, 1):
        given: dict[int, Placement] = {}
        if d == 1 and not _heads_divide(query, key, 1):
            continue
        if _is_tensor(mask) and mask.shape[d] != 1:
            given[first] = Shard(d)
        if _is_tensor(lengths) and d == 0:
            given[first + 1] = Shard(0)
        if _is_tensor(slopes) and (d == 1 or slopes.ndim == 2):
            given[first + 2] = Shard(d if slopes.ndim == 2 else 0)
        if _is_tensor(sink) and d == 1:
            given[first + 3] = Shard(0)
        found.append((d, given))
    return found


def _attention(*args: Any) -> list[Choice]:
    """query, key, value, rules -> output, log-sum-exp: batch and heads are split."""
    found = [_whole(2, args)]
    for d, given in _attention_rules(args, 3, args[0], args[1]):
        found.append(_choice([Shard(d)] * 2, {0: Shard(d), 1: Shard(d), 2: Shard(d)} | given, args))
    return found


def _attention_backward(*args: Any) -> list[Choice]:
    """grad_output, grad_logsumexp, query, key, value, output, logsumexp, rules, mask_grad -> those of query, key,
    value, mask and sink; of what every part used the whole of, each has a part of the sum."""
    found = [_whole(5, args)]
    for d, given in _attention_rules(args, 7, args[2], args[3]):
        mask: Placement = given.get(7, Partial()) if args[-1] else Replicate()
        sink: Placement = given.get(10, Partial()) if _is_tensor(args[10]) else Replicate()
        tensors: dict[int, Placement] = {i: Shard(d) for i in range(7)}
        found.append(_choice([*[Shard(d)] * 3, mask, sink], tensors | given, args))
    return found


def _varlen(*args: Any) -> list[Choice]:
    """query, key, value (T, H, D), bounds, ... -> output, log-sum-exp (H, T): heads are split. Slopes, sinks and
    dropout are computed whole."""
    found = [_whole(2, args)]
    if _heads_divide(args[0], args[1], 1) and not any(_is_tensor(a) for a in args[7:10]):
        found.append(_choice([Shard(1), Shard(0)], {i: Shard(1) for i in range(3)}, args))
    return found


def _varlen_backward(*args: Any) -> list[Choice]:
    """grad_output, grad_logsumexp, query, key, value, output, logsumexp, bounds, ... -> those of query, key, value and
    sink, which is empty here."""
    found = [_whole(4, args)]
    if _heads_divide(args[2], args[3], 1) and not any(_is_tensor(a) for a in args[11:14]):
        given: dict[int, Placement] = {i: Shard(0 if i in (1, 6) else 1) for i in range(7)}
        found.append(_choice([*[Shard(1)] * 3, Replicate()], given, args))
    return found


def _int8_linear(*args: Any) -> list[Choice]:
    """x, weight, weight_scale, bias, residual, input_scale, inputs, group, rotate, activation -> y: rows of x are
    split, or the outputs, where no activation pairs them. A part's K would need others' scales: it is not split."""
    x = args[0]
    found = [_whole(1, args)]
    for d in range(x.ndim - 1):
        found.append(_choice([Shard(d)], {0: Shard(d), 4: Shard(d)}, args))
    if args[9] not in ("swiglu", "geglu"):
        last = Shard(x.ndim - 1)
        found.append(_choice([last], {1: Shard(0), 2: Shard(0), 3: Shard(0), 4: last}, args))
    return found


def _rows(results: int, tensors: int) -> Callable[..., list[Choice]]:
    """Rows are alone: all results and the first tensors are split by them."""

    def rule(*args: Any) -> list[Choice]:
        split = _choice([Shard(0)] * results, dict.fromkeys(range(tensors), Shard(0)), args)
        return [_whole(results, args), split]

    return rule


def _distillation_backward(*args: Any) -> list[Choice]:
    """grad_soft, grad_hard, student, teacher, targets, statistics, soft, ..., needs -> those of student and teacher,
    empty where they are not wanted."""
    results: list[Placement] = [Shard(0) if wanted else Replicate() for wanted in args[9]]
    return [_whole(2, args), _choice(results, dict.fromkeys(range(7), Shard(0)), args)]


def _linear_gradients(bias: Any, needs: Iterable[bool]) -> list[Placement]:
    """Those of hidden, weight and bias, the last two sums over rows, empty where they are not wanted."""
    of_hidden, of_weight, of_bias = needs
    return [
        Shard(0) if of_hidden else Replicate(),
        Partial() if of_weight else Replicate(),
        Partial() if of_bias and _is_tensor(bias) else Replicate(),
    ]


def _linear_cross_entropy(*args: Any) -> list[Choice]:
    """hidden, weight, bias, targets, ..., reduction, needs -> loss, log-sum-exp and the gradients: rows are split. Of a
    mean each part would need to know how many rows count in the others: the function asks for sums."""
    found = [_whole(5, args)]
    _, _, bias, *_, reduction, needs = args
    if reduction != "mean":
        none = reduction == "none"
        gradients = _linear_gradients(bias, [False] * 3 if none else needs)
        results = [Shard(0) if none else Partial(), Shard(0), *gradients]
        found.append(_choice(results, {0: Shard(0), 3: Shard(0)}, args))
    return found


def _linear_cross_entropy_backward(*args: Any) -> list[Choice]:
    """grad_loss, hidden, weight, bias, targets, log-sum-exp, ..., needs -> the gradients."""
    split = _choice(_linear_gradients(args[3], args[-1]), {i: Shard(0) for i in (0, 1, 4, 5)}, args)
    return [_whole(3, args), split]


def _linear_distillation(*args: Any) -> list[Choice]:
    """It adds two means, over all rows and over those that count: computed whole."""
    return [_whole(6, args)]


_RULES: dict[str, Callable[..., list[Choice]]] = {
    "norm": _norm,
    "norm_backward": _norm_backward,
    "gated": _elementwise(1, 2),
    "gated_backward": _elementwise(2, 3),
    "rotary": _rotary,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_varlen": _varlen,
    "attention_varlen_backward": _varlen_backward,
    "int8_linear": _int8_linear,
    "cross_entropy": _rows(2, 2),
    "cross_entropy_backward": _rows(1, 4),
    "distillation": _rows(3, 3),
    "distillation_backward": _distillation_backward,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward,
    "linear_distillation": _linear_distillation,
}


def register() -> None:
    """Gives torch's DTensor the rules of every operator above; again is as once. The rules of int8_linear are for
    inference."""
    for name, rule in _RULES.items():
        register_sharding(getattr(torch.ops.llmkern, name).default)(rule)
