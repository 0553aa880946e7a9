"""A pass over a user's data before quantisation: what each linear layer is given, and who makes it.

`collect` runs the model as it is and notes, for every nn.Linear, the range of its inputs, the largest magnitude of each
channel, and some rows to judge the quantised layer by. `smooth` divides channels of large inputs where they are made
(Xiao et al. 2023, "SmoothQuant", section 4): in the norm, or in the linear layer behind a product (the up projection of
SwiGLU), whose output nothing but linear layers reads. `observe` sees that by watching torch's operations.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern.int8.reference import hadamard
from llmkern.int8.scheme import rotation_size

KEPT_ROWS = 256


@dataclass
class Seen:
    """The inputs of one linear layer."""

    rotation: int = 1  #: the size of Hadamard's transform behind which the range is taken
    low: float = 0.0
    high: float = 0.0
    channels: Tensor | None = None  #: the largest magnitude of each, (K,)
    rows: list[Tensor] = field(default_factory=list)  #: up to KEPT_ROWS of them, (M, K) float32

    def add(self, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.size(-1)).float()
        x = x[x.isfinite().all(1)]
        if not x.numel():
            return
        turned = hadamard(x, self.rotation)
        self.low, self.high = min(self.low, turned.min().item()), max(self.high, turned.max().item())
        most = x.abs().amax(0)
        self.channels = most if self.channels is None else torch.maximum(self.channels, most)
        missing = KEPT_ROWS - sum(map(len, self.rows))
        if missing > 0:
            self.rows.append(x[:: max(1, len(x) // missing)][:missing].clone())

    def static_scale(self) -> Tensor:
        """Scale and zero point that span the range."""
        scale = max((self.high - self.low) / 255, torch.finfo(torch.float32).tiny)
        return torch.tensor([scale, round(-self.low / scale)], dtype=torch.float32)


def run(model: nn.Module, inputs: Any) -> Any:
    """model(...) on one item of calibration data: a mapping of keywords, a sequence of arguments, or one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


@torch.no_grad()
def collect(
    model: nn.Module, data: Iterable[Any], progress: bool = False, rotate: bool = False
) -> dict[nn.Linear, Seen]:
    """What the model's linear layers are given over the data; in the mode that the model is in, without gradients.

    rotate: the ranges are those behind the rotation. Layers that were given nothing finite are left out. Raises
    ValueError for data without items.
    """
    seen: dict[nn.Linear, Seen] = {}

    def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(layer, nn.Linear)
        seen.setdefault(layer, Seen(rotation_size(layer.in_features) if rotate else 1)).add(_given(args, kwargs))

    linears = [m for m in model.modules() if type(m) is nn.Linear]
    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in linears]
    count = 0
    try:
        for item in _with_progress(data, progress):
            run(model, item)
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("calibration: expected an iterable of inputs, got one without any")
    return {layer: found for layer, found in seen.items() if found.channels is not None}


def _given(args: Any, kwargs: Any) -> Tensor:
    """The input of an nn.Linear's call."""
    given: Tensor = args[0] if args else kwargs["input"]
    return given


def _with_progress(data: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        yield from data
        return
    try:
        from tqdm import tqdm
    except ImportError:
        begun = said = time.monotonic()
        for i, item in enumerate(data):
            if time.monotonic() - said > 2:
                said = time.monotonic()
                print(f"calibration: batch {i + 1}, {said - begun:.0f} s", file=sys.stderr)
            yield item
    else:
        yield from tqdm(data, desc="calibration", unit="batch", leave=False)


@dataclass(frozen=True)
class Fold:
    """Where the division of some layers' inputs can go: into the rows of `maker`, whose output only they read."""

    maker: nn.Module
    readers: tuple[nn.Linear, ...]


class _Watch(TorchDispatchMode):
    """Notes which operations read each storage. Everything that was seen is kept alive, so that addresses stay
    apart."""

    VIEWS = ("view", "_unsafe_view", "reshape", "t", "transpose", "expand", "detach", "alias", "unsqueeze", "squeeze")
    PRODUCTS = ("mm", "addmm", "bmm", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[int, list[str]] = {}
        self.factors: dict[int, tuple[int, int]] = {}  # of products of elements
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = _tensors_in((args, kwargs))
        self.alive.append((tensors, result))
        if name not in self.VIEWS:
            for t in tensors:
                self.readers.setdefault(_place(t), []).append(name)
            if name == "mul" and len(tensors) == 2 and isinstance(result, Tensor):
                self.factors[_place(result)] = (_place(tensors[0]), _place(tensors[1]))
        return result


def _tensors_in(value: Any) -> list[Tensor]:
    """All tensors in lists, tuples, mappings and objects with fields, however deep."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in fields(value)]
    if not isinstance(value, (list, tuple, set, frozenset)):
        return []
    return [t for item in value for t in _tensors_in(item)]


def _place(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@torch.no_grad()
def observe(model: nn.Module, inputs: Any) -> list[Fold]:
    """Where divisions can be folded in, from one pass over one item of data."""
    given: dict[int, list[nn.Linear]] = {}
    made: dict[int, nn.Module] = {}
    watch = _Watch()

    def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(layer, nn.Linear)
        given.setdefault(_place(_given(args, kwargs)), []).append(layer)

    def after(maker: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made[_place(output)] = maker

    handles = []
    for module in model.modules():
        if type(module) is nn.Linear:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if _is_maker(module):
            handles.append(module.register_forward_hook(after))
    try:
        with watch:
            output = run(model, inputs)
        for t in _tensors_in(output):  # what the caller gets, he reads
            watch.readers.setdefault(_place(t), []).append("output")
    finally:
        for handle in handles:
            handle.remove()
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    folds = []
    for place, readers in given.items():
        read = watch.readers.get(place, [])
        if len(set(readers)) != len(readers) or len(read) != len(readers):
            continue  # a layer that runs twice, or something else that reads it
        if any(name not in watch.PRODUCTS for name in read):
            continue
        maker = made.get(place)
        if maker is None:
            for factor in watch.factors.get(place, ()):
                one = made.get(factor)
                if isinstance(one, nn.Linear) and watch.readers.get(factor) == ["mul"]:
                    maker = one
        if maker is None or list(made.values()).count(maker) != 1 or maker in readers:
            continue
        changed = [*maker.parameters(recurse=False), *(layer.weight for layer in readers)]
        if all(owners[id(p)] == 1 for p in changed):  # not an embedding's weight too
            folds.append(Fold(maker, tuple(readers)))
    return folds


def _is_maker(module: nn.Module) -> bool:
    """A linear layer, or what looks like a norm: a weight of one dimension, and at most a bias beside it."""
    weight = getattr(module, "weight", None)
    parameters = {name for name, _ in module.named_parameters()}
    return type(module) is nn.Linear or (
        isinstance(weight, Tensor) and weight.dim() == 1 and parameters <= {"weight", "bias"}
    )


@torch.no_grad()
def smooth(fold: Fold, seen: dict[nn.Linear, Seen], strength: float) -> bool:
    """Divides the channels that `fold.maker` makes and multiplies the readers' weights; False where that changes more.

    By |x|^strength / |w|^(1 - strength) of each channel (Xiao et al. 2023, equation 4). What a norm does with its
    weight is not known: whether its output is divided is tried on numbers first.
    """
    found = [seen[layer].channels for layer in fold.readers if layer in seen]
    if len(found) != len(fold.readers) or any(c is None for c in found):
        return False
    inputs = torch.stack([c for c in found if c is not None]).amax(0)
    weights = torch.stack([layer.weight.float().abs().amax(0) for layer in fold.readers]).amax(0)
    factor = (inputs.pow(strength) / weights.pow(1 - strength).clamp(min=1e-5)).clamp(min=1e-5)
    factor = torch.where((inputs > 0) & (weights > 0), factor, torch.ones_like(factor))
    factor = factor / factor.log().mean().exp()  # as large on average as before
    own = [p for p in (fold.maker.weight, getattr(fold.maker, "bias", None)) if isinstance(p, Tensor)]
    if own[0].size(0) != factor.size(0):
        return False
    kept = [p.clone() for p in own]
    trial = _trial(fold.maker, own[0])
    before = fold.maker(trial)
    for p in own:
        p.div_(factor.view(-1, *(1,) * (p.dim() - 1)).to(p.dtype))
    error = (fold.maker(trial).float() * factor - before.float()).norm() / before.float().norm().clamp(min=1e-30)
    if not error < 0.02:  # a norm that multiplies by 1 + weight, say; the dtype's own rounding passes
        for p, values in zip(own, kept, strict=True):
            p.copy_(values)
        return False
    for layer in fold.readers:
        layer.weight.mul_(factor.to(layer.weight.dtype))
        channels = seen[layer].channels
        assert channels is not None
        seen[layer].channels = channels / factor
        seen[layer].rows = [rows / factor for rows in seen[layer].rows]
    return True


def _trial(maker: nn.Module, weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    features = maker.in_features if isinstance(maker, nn.Linear) else weight.size(0)
    return torch.randn(4, features, generator=generator).to(weight.device, weight.dtype)
