"""Modules that are known by what they compute, not by their class: RMSNorms and gated feed-forward layers of models.

A candidate is known by its parameters and attributes, as the published models have them, and then asked: its own
forward on random numbers, with random weights in its place, must give what the kernel's formula gives. So a model that
is not known here is either served rightly or left.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import check
from llmkern.activation import op as activation
from llmkern.activation import reference as plain_activation
from llmkern.int8 import reference as plain_int8
from llmkern.int8.replace import has_hooks
from llmkern.norm import op as norm
from llmkern.norm import reference as plain_norm

#: Names under which models keep the number that is added to the mean of squares.
_EPS = ("variance_epsilon", "eps", "epsilon")
#: Why a module is left whose forward was put on the object itself.
OWN_FORWARD = "it has a forward of its own"
LINEAR = (nn.Linear, plain_int8.Int8Linear)


@dataclass(frozen=True)
class Parts:
    """The names under which a gated feed-forward layer keeps what it is made of."""

    gate: str
    up: str  #: empty: gate makes both, the gate in the first half
    down: str
    function: str
    dropout: str = ""
    casts: bool = False  #: down may be of another dtype, which its input is then made

    @property
    def projections(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.down) if name)


GATED = (
    Parts("gate_proj", "up_proj", "down_proj", "act_fn"),  # Llama and most since
    Parts("gate_up_proj", "", "down_proj", "activation_fn"),  # Phi-3, GLM
    Parts("wi_0", "wi_1", "wo", "act", "dropout", casts=True),  # T5 1.1; keeps wo in float32
    Parts("Wi", "", "Wo", "act", "drop"),  # ModernBERT
)


class FusedRMSNorm(nn.Module):
    """The forward of an RMSNorm, for `fused_class`."""

    weight: nn.Parameter
    _llmkern_eps: float
    _llmkern_offset: float
    _llmkern_keeps: bool

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """x (..., N), under whatever name the model gives it. Returns its shape, in the dtype of the model's own
        forward."""
        (hidden_states,) = *args, *named.values()
        dtype, weight = hidden_states.dtype, self.weight.dtype
        same = weight == dtype or (self._llmkern_keeps and weight == torch.float32)
        if dtype not in check.FLOATS or not same:
            plain: Tensor = super().forward(hidden_states)
            return plain
        result: Tensor = norm.rms_norm(hidden_states, self.weight, self._llmkern_eps, offset=self._llmkern_offset)
        return result


class FusedGated(nn.Module):
    """The forward of a gated feed-forward layer, down(f(gate(x)) * up(x)), for `fused_class`."""

    _llmkern_activation: str
    _llmkern_parts: Parts

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """x (..., W), under whatever name the model gives it. Returns its shape and dtype."""
        (x,) = *args, *named.values()
        parts = self._llmkern_parts
        if parts.up:
            gate, up = getattr(self, parts.gate)(x), getattr(self, parts.up)(x)
        else:
            gate, up = getattr(self, parts.gate)(x).chunk(2, -1)
        if gate.dtype not in check.FLOATS or gate.dtype != up.dtype:
            middle = getattr(self, parts.function)(gate) * up
        else:
            middle = activation.gated(gate, up, self._llmkern_activation)
        if parts.dropout:
            middle = getattr(self, parts.dropout)(middle)
        down = getattr(self, parts.down)
        if parts.casts and down.weight.is_floating_point():
            middle = middle.to(down.weight.dtype)
        result: Tensor = down(middle)
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
    if left := why_not_to_ask(module):
        return left
    shape = tuple(parameters["weight"].shape)
    # The second row's mean square is about eps, so that it shows where eps stands; the third is 0.
    x, weight = numbers((3, *shape)) * torch.tensor([[1.0], [math.sqrt(eps)], [0.0]]), numbers(shape)
    asked = stand_in(module, _parameters={"weight": nn.Parameter(weight)})
    for offset in (0.0, 1.0):
        expected = plain_norm.norm(x, None, weight, None, eps, offset, False)[0]
        if all(agree(given, expected) for given in answers(asked, x)):
            short = answer(asked, x.bfloat16())
            keeps = isinstance(short, Tensor) and short.dtype == torch.bfloat16
            return {"_llmkern_eps": eps, "_llmkern_offset": offset, "_llmkern_keeps": keeps}
    return "it computes something else than an RMSNorm of the last dimension"


def gated(module: Any) -> dict[str, Any] | str | None:
    """As `rms_norm`, of a gated feed-forward layer."""
    children = dict(module.named_children())
    parts = next((p for p in GATED if _has(module, children, p)), None)
    if parts is None:
        return None
    if left := why_not_to_ask(module):
        return left
    more = sorted(set(children) - {*parts.projections, parts.function, parts.dropout})
    if more:
        return f"it has more than {', '.join(parts.projections)} and {parts.function}: {', '.join(more)}"
    own = getattr(module, parts.function)
    if isinstance(own, nn.Module) and (has_hooks(own) or any(own.parameters()) or any(own.buffers())):
        return f"its activation, {type(own).__name__}, has hooks, parameters or buffers"
    function = _activation(own)
    if function is None:
        return f"its activation, {type(own).__name__}, has no kernel"
    # Asked with plain layers of random weights in place of its own, which may be int8 or without values.
    linear = {}
    for seed, name in enumerate(parts.projections):
        own_layer: Any = children[name]
        shape = (own_layer.out_features, own_layer.in_features)
        linear[name] = random_linear(shape, own_layer.bias is not None, seed)
    dropout = {parts.dropout: nn.Identity()} if parts.dropout else {}
    asked = stand_in(module, _modules={**module._modules, **linear, **dropout})
    x = numbers((3, children[parts.gate].in_features))
    with torch.no_grad():
        gate = linear[parts.gate](x)
        gate, up = (gate, linear[parts.up](x)) if parts.up else gate.chunk(2, -1)
        expected = linear[parts.down](plain_activation.gated(gate, up, function))
    if all(agree(given, expected) for given in answers(asked, x)):
        return {"_llmkern_activation": function, "_llmkern_parts": parts}
    gate_up = f"{parts.gate}(x)) * {parts.up}(x)" if parts.up else f"a) * b), a and b the halves of {parts.gate}(x"
    return f"it computes something else than {parts.down}({parts.function}({gate_up})"


def _has(module: nn.Module, children: dict[str, nn.Module], parts: Parts) -> bool:
    """Whether a module has these parts, of sizes that fit."""
    made = [children.get(name) for name in parts.projections]
    if not all(isinstance(m, LINEAR) for m in made) or not hasattr(module, parts.function):
        return False
    if parts.dropout and not isinstance(children.get(parts.dropout), nn.Dropout):
        return False
    gate, *_, down = made
    return bool(gate.out_features == (1 if parts.up else 2) * down.in_features)  # type: ignore[union-attr, operator]


def random_linear(shape: tuple[int, int], bias: bool, seed: int) -> nn.Linear:
    """A plain layer with random weights of this shape, (outputs, inputs)."""
    made = nn.Linear(shape[1], shape[0], bias, "meta")
    made.weight = nn.Parameter(numbers(shape, seed), requires_grad=False)
    if bias:
        made.bias = nn.Parameter(numbers(shape[:1], seed), requires_grad=False)
    return made


def _activation(function: Any) -> str | None:
    """The name of the activation that a function is, by what it gives."""
    far = torch.tensor([11.0, 30.0, 1e4])  # some are bounded
    x = torch.cat([-far, torch.linspace(-6.0, 6.0, 97), far])
    try:
        given = function(x)
    except Exception:
        return None
    if not isinstance(given, Tensor) or given.shape != x.shape:
        return None
    names = plain_activation.FUNCTIONS.items()
    return next((name for name, plain in names if torch.allclose(given, plain(x), rtol=1e-5, atol=1e-6)), None)


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random numbers, the same every time, in float32 on the CPU; no generator of torch's moves on.

    A matrix has the rows that a window sees which moves along one sequence: numbers for a large model cost time.
    """
    generator = torch.Generator("cpu").manual_seed(1000 * seed + sum(shape))
    if len(shape) != 2:
        return torch.randn(shape, generator=generator)
    rows, columns = shape
    return torch.randn(rows + columns, generator=generator).as_strided((rows, columns), (1, 1)).contiguous()


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """What is made and computed within is float32 on the CPU, whatever holds around."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=()):
            yield
    finally:
        torch.set_default_dtype(before)


def why_not_to_ask(module: nn.Module) -> str:
    """Why a module that a kernel might serve is not asked, and so left; empty where it is."""
    if "forward" in vars(module):
        return OWN_FORWARD
    _, *taken = inspect.signature(type(module).forward).parameters.values()
    one = len(taken) == 1 and taken[0].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return "" if one else f"its forward takes more than one tensor: {', '.join(map(str, taken))}"


def stand_in(module: nn.Module, **attributes: Any) -> nn.Module:
    """A copy of a module, in inference, with other parts; the module itself stays as it is."""
    asked = copy.copy(module)
    vars(asked).update(attributes, training=False)
    return asked


def with_global(function: Any, name: str, value: Any) -> types.FunctionType:
    """A function of a model's file with one of the file's names bound to something else, for it alone."""
    names = {**function.__globals__, name: value}
    names.pop("__name__", None)  # torch.compile would read the globals of the module of that name instead of these
    made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    return made


@torch.no_grad()
def answer(asked: nn.Module, *inputs: Any, **named: Any) -> Any:
    """What a module's forward gives; None where it raises."""
    try:
        return asked.forward(*inputs, **named)
    except Exception:  # of a forward that is nobody's here: then it is not known
        return None


def answers(asked: nn.Module, x: Tensor) -> Iterator[Any]:
    """What a module's forward gives in inference and, as it may drop something then, in training."""
    for training in (False, True):
        vars(asked)["training"] = training
        yield answer(asked, x)


def agree(given: Any, expected: Tensor) -> bool:
    """Whether what was given is what is expected, but for the rounding of float32."""
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return False
    return all(
        torch.allclose(a.float(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        for a, b in zip(given, expected, strict=True)
    )
