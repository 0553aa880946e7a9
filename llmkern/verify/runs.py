"""Runs a function forward and backward on copies of the caller's arguments, leaving everything as it was."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmkern.check import short

_SEED = 20240


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf of nested tuples, lists, mappings and dataclasses, with its path; a lone value is its own leaf."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}.{field.name}")
    else:
        yield path, value


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same nesting with every leaf replaced."""
    if isinstance(value, Mapping):
        items = {k: _map(v, function) for k, v in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, function) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return dataclasses.replace(value, **{n: _map(getattr(value, n), function) for n in names})
    return function(value)


@dataclasses.dataclass
class Run:
    outputs: dict[str, Any]
    cotangents: dict[str, Tensor]
    inputs: dict[str, Tensor | None]
    parameters: dict[str, Tensor | None]


class Arguments:
    """The caller's arguments, and which of their tensors are differentiated."""

    def __init__(self, reference: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], gradients: bool):
        self.args, self.kwargs = args, kwargs
        try:
            signature = inspect.signature(reference.forward if isinstance(reference, nn.Module) else reference)
            named = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        except (TypeError, ValueError):
            named = []
        self.tensors: dict[int, tuple[str, Tensor]] = {}  # by identity: a tensor given twice is one input
        for i, value in enumerate(args):
            self._collect(value, named[i] if i < len(named) else f"inputs[{i}]")
        for key, value in kwargs.items():
            self._collect(value, key)
        floating = {i: t for i, (_, t) in self.tensors.items() if t.is_floating_point()}
        asked = {i for i, t in floating.items() if t.requires_grad}
        self.differentiated: set[int] = (asked or set(floating)) if gradients else set()
        self.gradients = gradients

    def _collect(self, value: Any, name: str) -> None:
        for path, leaf in _leaves(value, name):
            if isinstance(leaf, Tensor):
                self.tensors.setdefault(id(leaf), (path, leaf))

    def copies(
        self, cast: torch.dtype | None, draw: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        """Fresh copies of the arguments, floating ones in `cast`, and the leaves to differentiate, by name.

        draw: other than 0, floating arguments are moved to a neighbour first.
        """
        leaves: dict[str, Tensor] = {}
        made: dict[int, Tensor] = {}
        for identity, (name, t) in self.tensors.items():
            moved = _moved(name, draw) if draw and t.is_floating_point() else None
            made[identity] = _strided_copy(t, cast if cast and t.is_floating_point() else t.dtype, moved)
            if identity in self.differentiated:
                leaves[name] = made[identity].requires_grad_()
                made[identity] = _Feed.apply(leaves[name])

        def replace(leaf: Any) -> Any:
            return made[id(leaf)] if isinstance(leaf, Tensor) else leaf

        return tuple(_map(a, replace) for a in self.args), {k: _map(v, replace) for k, v in self.kwargs.items()}, leaves

    def half_precision(self, function: Callable[..., Any]) -> torch.dtype | None:
        """The one half precision that the inputs and the module's parameters have, if any."""
        tensors = [t for _, t in self.tensors.values()]
        if isinstance(function, nn.Module):
            tensors += function.parameters()
        found = {t.dtype for t in tensors if t.dtype in (torch.float16, torch.bfloat16)}
        return found.pop() if len(found) == 1 else None


def run(
    function: Callable[..., Any],
    arguments: Arguments,
    *,
    cast: torch.dtype | None = None,
    rounded: torch.dtype | None = None,
    cotangents: Mapping[str, Tensor] | None = None,
    draw: int = 0,
) -> Run:
    """Runs the function forward and backward; `rounded` rounds what came out as float32 in the end.

    draw: other than 0, the arguments are moved to a neighbour.
    """
    with _buffers_kept(function):  # until after the backward, which may need them as they were left
        return _run(function, arguments, cast, rounded, cotangents, draw)


def _run(
    function: Callable[..., Any],
    arguments: Arguments,
    cast: torch.dtype | None,
    rounded: torch.dtype | None,
    cotangents: Mapping[str, Tensor] | None,
    draw: int,
) -> Run:
    args, kwargs, leaves = arguments.copies(cast, draw)
    devices = {t.device.index or 0 for _, t in arguments.tensors.values() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(_SEED)
        with _Float64Mode() if cast is torch.float64 else nullcontext():
            result = function(*args, **kwargs)
    outputs = dict(_leaves(result, "output"))
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {short(value.dtype)}")
        if not isinstance(value, (Tensor, bool, int, float, str, type(None))):
            raise TypeError(f"{name}: expected a tensor, a plain value or None, got {type(value).__name__}")
    floating = {n: o for n, o in outputs.items() if isinstance(o, Tensor) and o.is_floating_point()}
    if cotangents is None:
        cotangents = {n: _cotangent(n, o.shape, rounded or o.dtype, o.device) for n, o in floating.items()}
    parameters = {}
    if isinstance(function, nn.Module):
        parameters = {n: p for n, p in function.named_parameters() if p.requires_grad}
    wanted = [*leaves.values(), *parameters.values()]
    pairs = [
        (o, cotangents[n].to(o))
        for n, o in floating.items()
        if o.requires_grad and n in cotangents and cotangents[n].shape == o.shape
    ]
    found: list[Tensor | None] = [None] * len(wanted)
    if arguments.gradients and pairs and wanted:
        found = list(torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True))

    def finished(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.to(rounded) if rounded and value.dtype == torch.float32 else value

    return Run(
        {n: finished(o) for n, o in outputs.items()},
        dict(cotangents),
        {n: finished(g) for n, g in zip(leaves, found[: len(leaves)], strict=True)},
        {n: finished(g) for n, g in zip(parameters, found[len(leaves) :], strict=True)},
    )


def _cotangent(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(device, dtype)


def _strided_copy(t: Tensor, dtype: torch.dtype, moved: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A copy in `dtype` with the strides and the storage offset of t, also where elements overlap, and no view.

    moved: what to do to the values before, where t is strided.
    """
    t = t.detach()
    if t.layout is not torch.strided:
        return t.to(dtype, copy=True)
    storage = t.untyped_storage()
    flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(
        storage, 0, (storage.nbytes() // t.element_size(),), (1,)
    )
    copied = (flat if moved is None else moved(flat)).to(dtype, copy=True).untyped_storage()
    return torch.empty(0, dtype=dtype, device=t.device).set_(copied, t.storage_offset(), t.size(), t.stride())


class _Feed(torch.autograd.Function):
    """The identity, as a copy: what a function receives is no leaf, so that it may also write into it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return _strided_copy(t, t.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _moved(name: str, draw: int) -> Callable[[Tensor], Tensor]:
    """A function that moves each element of a tensor by chance, the same for the same name and draw.

    In even draws an element moves one step up or down in its own dtype, or stays: what is rare may happen again. In
    odd ones it moves by up to an eighth: magnitudes that happen to round well for one version do so no longer. Whole
    numbers stay: zeros, flags and counts mean something that their neighbours do not.
    """

    def move(t: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{draw} {name}".encode()))
        values = t.detach().cpu()
        if draw % 2:
            moved = values * (1.0 + (torch.rand(t.shape, generator=generator) - 0.5) / 4).to(values.dtype)
        else:
            step = torch.randint(-1, 2, t.shape, generator=generator)
            moved = torch.nextafter(values, torch.where(step > 0, torch.inf, -torch.inf).to(values.dtype))
            moved = torch.where(step == 0, values, moved)
        return torch.where((values == values.round()) | ~moved.isfinite(), values, moved).to(t.device)

    return move


def neighbour(function: Callable[..., Any], draw: int) -> Callable[..., Any]:
    """A copy of a module, its floating parameters moved as the arguments of that draw; a function is itself."""
    if not isinstance(function, nn.Module):
        return function
    function = copy.deepcopy(function)
    with torch.no_grad():
        for name, parameter in function.named_parameters():
            if parameter.is_floating_point():
                parameter.copy_(_moved(name, draw)(parameter))
    return function


def same_parameters(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Both are modules with the same parameters by name, dtype and value."""
    if not isinstance(one, nn.Module) or not isinstance(other, nn.Module):
        return False
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(
        p.dtype == theirs[n].dtype and p.device == theirs[n].device and torch.equal(p, theirs[n])
        for n, p in ours.items()
    )


def in_dtype(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    return copy.deepcopy(function).to(dtype) if isinstance(function, nn.Module) else function


class _Float64Mode(TorchFunctionMode):
    """Turns every request for a lower floating dtype into one for float64.

    A reference that computes its softmax in float32 and casts back would otherwise give a truth of float32.
    """

    CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
    LOWER = frozenset({torch.float32, torch.float16, torch.bfloat16})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.CASTS:
            return args[0].double()
        args = [torch.float64 if isinstance(a, torch.dtype) and a in self.LOWER else a for a in args]
        changed = {
            k: torch.float64 if isinstance(v, torch.dtype) and v in self.LOWER else v for k, v in (kwargs or {}).items()
        }
        return func(*args, **changed)


@contextmanager
def _buffers_kept(function: Callable[..., Any]) -> Iterator[None]:
    """Gives a module's buffers (running statistics) their values back afterwards."""
    buffers = list(function.buffers()) if isinstance(function, nn.Module) else []
    saved = [(b, b.clone()) for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                # By value: batch_norm writes its statistics without counting a new version.
                same = (buffer == value) | ((buffer != buffer) & (value != value))
                if not same.all():
                    buffer.copy_(value)
