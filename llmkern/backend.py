"""Which backend serves a call of an operator.

Each family's op.py gives every operator its backends, in order, per device type. A backend stands beside its kernel
and says in one sentence why it cannot serve given arguments, or nothing where it can; the choice looks only at
metadata (device, dtype, shape), never at data. The same sentences appear in the fallback warning, in errors and on the
status page (`python -m llmkern`).

The first backend that can serve a call does. On a GPU, where CUDA C++ and Triton may both have a kernel, the table
PREFERENCES says which comes first, by operator, compute capability and shape, and why. The checks of the arguments and
the choice are made once for each combination of metadata and kept with the backend's launcher as a plan, so that a
repeated call pays one look-up. A backend asked for by name (`use("triton")` or LLMKERN_BACKEND) serves a call or
raises: it never falls back.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmkern import extension, monitoring
from llmkern.operator import check_types

NAMES = ("cpu", "cuda", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator."""

    name: str
    #: Takes the operator's arguments and returns the launcher for all calls with the same metadata, which takes
    #: them again. It may bind sizes and strides, and no address.
    plan: Callable[..., Callable[..., Any]]
    #: Takes the same arguments; the reason why this backend cannot serve them, or None.
    unsupported: Callable[..., str | None]


def _any_shape(*args: Any) -> bool:
    return True


def _few_rows(x: Tensor, *args: Any) -> bool:
    return x.numel() <= 8 * x.shape[-1]


def _for_hopper(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> bool:
    """What csrc/attention/cuda_sm90.cu takes: 16 bits, 64 or 128 wide, no mask, slopes, sink, soft cap or dropout."""
    usual = query.element_size() == 2 and query.shape[-1] == value.shape[-1] in (64, 128)
    mask, _, slopes, sink = rules[:4]
    softcap, dropout = rules[8:10]
    return usual and mask is slopes is sink is None and softcap == 0.0 and dropout == 0.0


@dataclass(frozen=True)
class Preference:
    """Which GPU backend comes first in an operator's list where more than one has a kernel.

    It orders the list and hides nothing: a preferred backend that cannot serve a call leaves it to the next.
    """

    operator: str
    #: The compute capabilities that it holds for, the first and the last of them.
    first: tuple[int, int]
    last: tuple[int, int]
    #: The shapes that it holds for, in words, and as a predicate of the operator's arguments that reads metadata alone.
    shapes: str
    holds: Callable[..., bool]
    backend: str
    reason: str

    @property
    def capabilities(self) -> str:
        first, last = (".".join(map(str, c)) for c in (self.first, self.last))
        return first if first == last else f"{first} and newer" if self.last >= NEWEST else f"{first} to {last}"


NEWEST = (99, 0)  # newer than every device: a range that ends here is open

#: The choice between CUDA C++ and Triton; the first line that holds decides. Nothing here was measured on a GPU: the
#: reasons are what the compilers show (`python -m llmkern inspect`: the serial share of the peak of the main loop's
#: mix) and how each of the two is loaded and launched.
PREFERENCES: list[Preference] = [
    Preference(
        "rotary", (8, 0), NEWEST, "any", _any_shape, "cuda",
        "its machine code is in the library for every head size, where Triton compiles at the first call with each; "
        "both move 16 bytes at a time, and the rest is little",
    ),
    Preference(
        "sinusoidal_add", (8, 0), NEWEST, "any", _any_shape, "cuda",
        "as rotary: the same accesses, and no compilation at the first call",
    ),
    Preference(
        "sinusoidal_dropout", (8, 0), NEWEST, "any", _any_shape, "cuda",
        "as sinusoidal_add, whose gradient it is",
    ),
    Preference(
        "int8_linear", (8, 0), NEWEST, "up to 8 rows", _few_rows, "cuda",
        "weights of few rows are read once, without filling up tiles of 16 rows, pairs read their inputs once, and the "
        "machine code is in the library; rotation and groups with zero points are in Triton alone",
    ),
    Preference(
        "int8_linear", (9, 0), (9, 0), "more rows", _any_shape, "cuda",
        "it adds one wgmma to the next without waiting for either, where Triton waits after every step: 94 to 99 % of "
        "the serial share with one digit or two, and 19 to 32 % with groups, where Triton has 20 to 21 %",
    ),
    Preference(
        "int8_linear", (8, 0), NEWEST, "more rows", _any_shape, "triton",
        "its tiles keep more products for each byte that they read: the serial share is 32 and 50 % on sm_80 with one "
        "digit and two, where CUDA C++ has 23 and 27 %, 14 % with groups to 5 %, and on sm_100 it takes tcgen05, where "
        "CUDA C++ takes mma.sync, a fifth of the peak at most",
    ),
    Preference(
        "attention", (9, 0), (9, 0), "heads of 64 or 128, keys hidden by place alone", _for_hopper, "cuda",
        "its kernel for Hopper gives the softmax of one warpgroup the time of another's products, which no share of a "
        "single warp's mix shows",
    ),
    Preference(
        "attention", (9, 0), (11, 99), "any other", _any_shape, "triton",
        "it multiplies by wgmma and tcgen05, where CUDA C++ has mma.sync left: at most 50 % of the peak on sm_90, 25 % "
        "on sm_100",
    ),
    Preference(
        "attention", (8, 0), NEWEST, "any", _any_shape, "cuda",
        "both multiply by mma.sync, with shares of the peak alike; its machine code is in the library for all rules, "
        "where Triton compiles at the first call with each; Triton has float32, heads up to 256 wide, and GPUs of AMD "
        "besides",
    ),
    Preference(
        "attention_backward", (8, 0), NEWEST, "any", _any_shape, "triton",
        "there is no CUDA kernel of the gradients yet",
    ),
    Preference(
        "attention_kvcache", (8, 0), NEWEST, "any", _any_shape, "cuda",
        "it reads keys and values straight into the operands of the matrix units, without shared memory, and its "
        "machine code is in the library; Triton has float32, and GPUs of AMD besides",
    ),
]  # fmt: skip


def preference(operator: str, capability: tuple[int, int], args: tuple[Any, ...]) -> Preference | None:
    """The line of the table that holds for this call on a device of this compute capability."""
    lines = (p for p in PREFERENCES if p.operator == operator and p.first <= capability <= p.last)
    return next((p for p in lines if p.holds(*args)), None)


def reference_backend(function: Callable[..., Any]) -> Backend:
    """The plain PyTorch version as a backend: it serves everything."""
    return Backend("reference", lambda *args: function, lambda *args: None)


class BackendError(RuntimeError):
    """The backend asked for by name cannot serve a call."""


_forced: str | None = None
_warned: set[tuple[str, str]] = set()


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


if os.environ.get("LLMKERN_BACKEND"):
    _forced = os.environ["LLMKERN_BACKEND"]
    if _forced not in NAMES:
        extension.refuse_setting("LLMKERN_BACKEND", NAMES, _forced)


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Serve every call inside the block by the backend `name` ("cpu", "cuda", "triton", "reference"), or raise.

    None goes back to the automatic choice. Holds for the whole process, not for the thread alone.
    """
    before = _forced
    force(name)
    try:
        yield
    finally:
        force(before)


def force(name: str | None) -> None:
    """As `use`, from here on. A name that is in force already stays so at no cost."""
    global _forced
    if name == _forced:
        return
    _forced = None if name is None else _checked(name)
    forget_plans()


def forget_plans() -> None:
    """Makes every choice anew at the next call; to be called when something that choices depend on has changed."""
    for plans in Plans.all:
        plans.clear()


class Plans(dict[Any, Callable[..., Any]]):
    """Launchers by the key of the calls that they serve.

    A program whose shapes never repeat must not let it grow without bound: past `most`, all are forgotten.
    """

    all: ClassVar[list[Plans]] = []
    most = 4096

    def __init__(self) -> None:
        super().__init__()
        Plans.all.append(self)

    def keep(self, key: Any, launch: Callable[..., Any]) -> Callable[..., Any]:
        if len(self) >= self.most:
            self.clear()
        self[key] = launch
        return launch


def _metadata(*args: Any) -> Any:
    """A key that is equal for calls whose metadata are, of any tensors."""
    key = extension._C.metadata_key(*args) if extension.SHORT_CALLS else None
    if key is not None:
        return key
    return tuple([(a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in args])


class Operator:
    """An operator's backends, best first, for each device type."""

    #: Every operator of the package by name; the status page lists them.
    all: ClassVar[dict[str, Operator]] = {}

    def __init__(
        self,
        name: str,
        check: Callable[..., None],
        example: Callable[[str, torch.dtype], tuple[Any, ...]] | None = None,
        **by_device: list[Backend],
    ) -> None:
        """check: raises on bad arguments, from metadata alone. example(device, dtype): arguments of a typical call,
        for the status page. by_device: cpu=[...], cuda=[...], other=[...], the backends of each device, best first."""
        self.name = name
        self.check = check
        self.example = example
        self.by_device = by_device
        self.plans = Plans()
        self.short = Plans()
        Operator.all[name] = self

    def run(self, *args: Any) -> Any:
        """Runs the operator, on the backend that serves these arguments. The first one is a tensor, on the device."""
        key = _metadata(*args)
        launch = self.plans.get(key)
        if launch is None:
            launch = self.plans.keep(key, self.plan(*args))
        return launch(*args)

    def plan(self, *args: Any) -> Callable[..., Any]:
        """Checks the arguments, and gives the launcher for all calls with their metadata."""
        self.check(*args)
        chosen = self._choose(args)
        launch: Callable[..., Any] = chosen.plan(*args)
        if monitoring.current is None:
            return launch
        fallback = chosen.name == "reference" and _forced is None
        return monitoring.current.counting(self.name, chosen.name, fallback, launch)

    def short_call(self, key: bytes, recorded: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        """The launcher of a public function's calls with this key (`operator.call_key`), kept in `short`.

        recorded: the operator's autograd.Function.apply, which serves the calls that autograd records.
        """
        check_types(self.name, args)
        return self.short.keep(key, recorded if key[0] else self.plan(*args))

    def _choose(self, args: tuple[Any, ...]) -> Backend:
        if _forced is not None:
            every = {b.name: b for listed in self.by_device.values() for b in listed}
            if _forced not in every:
                raise BackendError(f"{self.name}: there is no {_forced} kernel of this operator")
            reason = every[_forced].unsupported(*args)
            if reason is None and all(b.name != _forced for b in self._listed(args)):
                reason = f"the tensors are on {args[0].device}"  # whose addresses another device's kernel cannot read
            if reason:
                raise BackendError(f"{self.name}: the backend {_forced} was asked for by name, but {reason}")
            return every[_forced]
        reasons: list[str] = []
        for backend in self._listed(args):
            reason = backend.unsupported(*args)
            if reason is None:
                self._warn(backend, reasons or [f"there is no kernel for {args[0].device.type} yet"])
                return backend
            reasons.append(f"{backend.name}: {reason}")
        raise BackendError(f"{self.name}: no backend can serve this call ({'; '.join(reasons)})")

    def _listed(self, args: tuple[Any, ...]) -> list[Backend]:
        """The backends for these arguments, best first."""
        device = args[0].device
        listed = self.by_device.get(device.type) or self.by_device["other"]
        if device.type != "cuda" or not torch.cuda.is_available():
            return listed
        found = preference(self.name, torch.cuda.get_device_capability(device), args)
        return listed if found is None else sorted(listed, key=lambda b: b.name != found.backend)

    def reasons(self, device: str, dtype: torch.dtype) -> list[tuple[str, str | None]]:
        """Each backend for this device with the reason why it cannot serve the typical call, or None where it can."""
        if self.example is None:
            return []
        with FakeTensorMode():  # describes tensors of devices that are not there
            args = self.example(device, dtype)
            return [(b.name, b.unsupported(*args)) for b in self._listed(args)]

    def _warn(self, backend: Backend, reasons: list[str]) -> None:
        message = "; ".join(reasons)
        if backend.name == "reference" and (self.name, message) not in _warned:
            _warned.add((self.name, message))
            warnings.warn(f"llmkern.{self.name} runs on the plain PyTorch reference ({message})", stacklevel=4)
