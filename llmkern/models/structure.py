"""Modules that are known by what they compute, not by their class: RMSNorms and gated feed-forward layers of models.

A candidate is known by its parameters and attributes, as the published models have them, and then asked: its own
forward on random numbers, with random weights in its place, must give what the kernel's formula gives. So a model that
is not known here is either served rightly or left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from llmkern import check
from llmkern.activation import op as activation
from llmkern.activation import reference as plain_activation
from llmkern.norm import op as norm
from llmkern.norm import reference as plain_norm

#: Names under which models keep the number that is added to the mean of squares.
_EPS = ("variance_epsilon", "eps", "epsilon")
_PARTS = ("gate_proj", "up_proj", "down_proj")


class FusedRMSNorm(nn.Module):
    """The forward of an RMSNorm, for `fused_class`."""

    weight: nn.Parameter
    _llmkern_eps: float
    _llmkern_offset: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., N). Returns its shape and dtype."""
        dtype = hidden_states.dtype
        if dtype not in check.FLOATS or self.weight.dtype not in (dtype, torch.float32):
            plain: Tensor = super().forward(hidden_states)
            return plain
        result: Tensor = norm.rms_norm(hidden_states, self.weight, self._llmkern_eps, offset=self._llmkern_offset)
        return result


class FusedGated(nn.Module):
    """The forward of a gated feed-forward layer, down_proj(f(gate_proj(x)) * up_proj(x)), for `fused_class`."""

    _llmkern_activation: str

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (..., W). Returns its shape and dtype."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype not in check.FLOATS or gate.dtype != up.dtype:
            gate = self.act_fn(gate) * up
        else:
            gate = activation.gated(gate, up, self._llmkern_activation)
        result: Tensor = self.down_proj(gate)
        return result


_made: dict[tuple[Any, Any], type[nn.Module]] = {}


def fused_class(kind: type[nn.Module], forward: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a model's own class with the forward of ours; it is pickled as the two that it is made of."""
    if (kind, forward) not in _made:

        def reduce(self: Any, protocol: Any) -> Any:
            return _empty, (kind, forward), self.__dict__

        body = {"__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _made[kind, forward] = type(f"Fused{kind.__name__}", (forward, kind), body)
    return _made[kind, forward]


def _empty(kind: type[nn.Module], forward: type[nn.Module]) -> nn.Module:
    made = fused_class(kind, forward)
    module: nn.Module = made.__new__(made)
    return module


def rms_norm(module: Any) -> dict[str, Any] | str | None:
    """What FusedRMSNorm needs of this module; a sentence where it looks like an RMSNorm and is none that is known; None
    where it does not look like one."""
    eps = next((getattr(module, n) for n in _EPS if isinstance(getattr(module, n, None), float)), None)
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or eps is None or "Norm" not in type(module).__name__:
        return None
    if parameters["weight"].dim() != 1 or list(module.buffers()):
        return "it has more than a weight of one dimension"
    shape = tuple(parameters["weight"].shape)
    x, weight = _numbers((3, *shape)), _numbers(shape)
    for offset in (0.0, 1.0):
        if _agrees(module, {"weight": weight}, x, plain_norm.norm(x, None, weight, None, eps, offset, False)[0]):
            return {"_llmkern_eps": eps, "_llmkern_offset": offset}
    return "it computes something else than an RMSNorm of the last dimension"


def gated(module: Any) -> dict[str, Any] | str | None:
    """As `rms_norm`, of a gated feed-forward layer."""
    children = dict(module.named_children())
    if any(not isinstance(children.get(p), nn.Linear) for p in _PARTS) or not hasattr(module, "act_fn"):
        return None
    more = sorted(set(children) - {*_PARTS, "act_fn"})
    if more:
        return f"it has more than gate_proj, up_proj, down_proj and act_fn: {', '.join(more)}"
    function = _activation(module.act_fn)
    if function is None:
        return f"its activation, {type(module.act_fn).__name__}, has no kernel"
    parameters = {name: _numbers(tuple(p.shape)) for name, p in module.named_parameters()}
    linear = [(parameters[f"{p}.weight"], parameters.get(f"{p}.bias")) for p in _PARTS]
    x = _numbers((3, linear[0][0].size(1)))
    middle = plain_activation.gated(F.linear(x, *linear[0]), F.linear(x, *linear[1]), function)
    if _agrees(module, parameters, x, F.linear(middle, *linear[2])):
        return {"_llmkern_activation": function}
    return "it computes something else than down_proj(act_fn(gate_proj(x)) * up_proj(x))"


def _activation(function: Any) -> str | None:
    """The name of the activation that a function is, by what it gives."""
    x = torch.linspace(-6.0, 6.0, 97)
    try:
        given = function(x)
    except Exception:
        return None
    if not isinstance(given, Tensor) or given.shape != x.shape:
        return None
    names = plain_activation.FUNCTIONS.items()
    return next((name for name, plain in names if torch.allclose(given, plain(x), rtol=1e-5, atol=1e-6)), None)


def _numbers(shape: tuple[int, ...]) -> Tensor:
    """Random numbers, the same every time, in float32 on the CPU; no generator of torch's moves on."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def _agrees(module: nn.Module, weights: dict[str, Tensor], x: Tensor, expected: Tensor) -> bool:
    """Whether the module's own forward, with these weights and in inference, gives what is expected."""
    training = module.training
    module.eval()
    try:
        given = functional_call(module, weights, (x,))
    except Exception:  # of a forward that is nobody's here: then it is not known
        return False
    finally:
        module.train(training)
    same = isinstance(given, Tensor) and given.shape == expected.shape
    return same and torch.allclose(given.float(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
