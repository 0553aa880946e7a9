"""Rotary embeddings of Hugging Face models on the fused kernel: attention modules known by what they compute.

transformers rotates queries and keys in a function of each model's file, `apply_rotary_pos_emb`, which the attention's
forward finds among the globals of that file. Its own way to exchange it, the kernels hub, exchanges it for every model
of the process at once and needs a package. Here an attention module gets a subclass of its class whose forward is its
own code, with that one name bound to the kernel; every other model keeps the function it had.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import check
from llmkern.models.structure import OWN_FORWARD, agree, answer, numbers, stand_in, with_global
from llmkern.positional import reference as plain_positional
from llmkern.positional.op import rotary

_NAME = "apply_rotary_pos_emb"
_Rotate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Turn:
    """How a model's function turns queries and keys, by what it gives."""

    halves: bool  #: tables of R columns hold R/2 twice, one copy behind the other; else each column twice
    interleaved: bool  #: pairs of elements are neighbours
    partial: bool  #: narrower tables turn the first elements of a row
    keeps: bool  #: float32 tables leave a 16-bit dtype as it is

    def columns(self, table: Tensor) -> Tensor:
        """The R/2 columns (..., R/2) that a table (..., R) holds twice."""
        return table[..., : table.size(-1) // 2] if self.halves else table[..., ::2]

    def doubled(self, table: Tensor) -> Tensor:
        return torch.cat((table, table), -1) if self.halves else table.repeat_interleave(2, -1)


def attention(model: nn.Module, name: str, module: nn.Module) -> type[nn.Module] | str | None:
    """The class that the module at this path of the model gets; a sentence where its rotation is not known; None where
    it is no attention that rotates."""
    turn = turn_of(model, name, module)
    return _fused_class(type(module), turn) if isinstance(turn, Turn) else turn


def turn_of(model: nn.Module, name: str, module: nn.Module) -> Turn | str | None:
    """How the attention at this path of the model rotates; else as `attention`."""
    forward: Any = getattr(type(module), "forward", None)
    own = inspect.unwrap(forward) if callable(forward) else None
    if not isinstance(own, types.FunctionType) or _NAME not in own.__code__.co_names or _NAME not in own.__globals__:
        return None
    if own is not forward:
        return "its forward is wrapped by another"
    if "forward" in vars(module):
        return OWN_FORWARD
    turn = _turn(own.__globals__[_NAME])
    if turn is None:
        return f"its {_NAME} computes something else than a rotation"
    modules = dict(model.named_modules())
    paths = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)] + [""]
    near = ([m for m in modules[path].modules() if "Rotary" in type(m).__name__] for path in paths)
    tables = next((found for found in near if found), [])
    if not tables or not all(_makes(turn, m) for m in tables):
        return "nothing is known of the tables of its rotation"
    return turn


def _turn(plain: _Rotate) -> Turn | None:
    """What a function of (q, k, cos, sin) is; None where it is no rotation that the kernel knows."""
    q, k = numbers((2, 3, 5, 16), 1), numbers((2, 1, 5, 16), 2)
    positions = torch.arange(10).view(2, 5)
    for halves, interleaved in ((True, False), (False, True), (True, True)):
        served = []
        for width in (16, 8):
            cos, sin = numbers((10, width // 2), 3), numbers((10, width // 2), 4)
            turn = Turn(halves, interleaved, False, False)
            tables = [turn.doubled(t).view(2, 5, width) for t in (cos, sin)]
            given = _given(plain, q, k, *tables)
            expected = plain_positional.rotary(q, k, cos, sin, interleaved=interleaved, position_ids=positions)
            served.append(all(b is not None and agree(a, b) for a, b in zip(given, expected, strict=True)))
            if width == 16:
                short = _given(plain, q.bfloat16(), k.bfloat16(), *tables)
                keeps = all(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in short)
        if served[0]:
            return Turn(halves, interleaved, served[1], keeps)
    return None


@torch.no_grad()
def _given(plain: _Rotate, *args: Tensor) -> tuple[Any, Any]:
    try:
        q, k = plain(*args)
    except Exception:  # of a function that is nobody's here: then it is not known
        return None, None
    return q, k


def _makes(turn: Turn, module: nn.Module) -> bool:
    """Whether what makes a model's tables, asked with random frequencies, makes those that the rotation reads."""
    frequencies: dict[str, Any] = {n: numbers(tuple(t.shape), 5) for n, t in module.named_buffers(recurse=False)}
    asked = stand_in(module, _buffers={**module._buffers, **frequencies})
    kinds = getattr(module, "layer_types", None)
    for layer in [()] if not kinds else [(kind,) for kind in kinds]:
        tables = answer(asked, torch.zeros(1, 4, 8), torch.arange(4)[None], *layer)
        if not isinstance(tables, tuple) or len(tables) != 2:
            return False
        for t in tables:
            if not isinstance(t, Tensor) or t.dim() != 3 or t.size(-1) % 2:
                return False
            if not torch.equal(turn.doubled(turn.columns(t)), t):
                return False
    return True


def _rotate(
    plain: _Rotate, turn: Turn, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any
) -> Any:
    """In place of a model's own function; what the kernel does not take is that function's to serve or to refuse."""
    if more or any(v != 1 for v in named.values()) or not _serves(turn, q, k, cos, sin):
        return plain(q, k, cos, sin, *more, **named)
    tables = [turn.columns(t).flatten(0, 1) for t in (cos, sin)]
    batch, _, length, _ = q.shape
    positions = None
    if cos.size(0) != 1:  # tables of each row's own
        positions = torch.arange(batch * length, device=q.device).view(batch, length)
    return rotary(q, k, *tables, interleaved=turn.interleaved, position_ids=positions)


def _serves(turn: Turn, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return False
    if q.dtype not in check.FLOATS or q.dtype != k.dtype or q.device != k.device:
        return False
    if cos.dtype != q.dtype and not (turn.keeps and cos.dtype == torch.float32):
        return False
    batch, _, length, width = q.shape
    if (k.size(0), *k.shape[2:]) != (batch, length, width) or cos.size(1) != length or cos.size(0) not in (1, batch):
        return False
    return cos.size(2) == width or (turn.partial and cos.size(2) < width)


_made: dict[tuple[Any, Turn], type[nn.Module]] = {}


def _fused_class(kind: type[nn.Module], turn: Turn) -> type[nn.Module]:
    """A subclass of the model's own class with its own forward, in which the function is ours."""
    if (kind, turn) not in _made:
        own: Any = kind.forward
        plain = own.__globals__[_NAME]
        forward = with_global(own, _NAME, partial(_rotate, plain, turn))

        def reduce(self: Any, protocol: Any) -> Any:
            return _empty, (kind, turn), self.__dict__

        body = {"__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__, "forward": forward}
        _made[kind, turn] = type(f"Fused{kind.__name__}", (kind,), body)
    return _made[kind, turn]


def _empty(kind: type[nn.Module], turn: Turn) -> nn.Module:
    made = _fused_class(kind, turn)
    module: nn.Module = made.__new__(made)
    return module
