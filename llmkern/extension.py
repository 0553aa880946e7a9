"""The compiled library, and what the Python side must know to call it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

# The numbers of enum DType in csrc/common/types.h; a test compares the two.
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.uint8: 4,
    torch.int32: 5,
    torch.int64: 6,
    torch.bool: 7,
}

_C: Any = None
#: Whether calls on plain tensors can take the short way of llmkern/operator.py. It needs DLPack's exchange API, of
#: torch 2.10 and newer; without, every call goes through torch's dispatcher.
SHORT_CALLS = False
#: Why the compiled library is missing; None where it is there.
MISSING: str | None = None


def _load() -> Any:
    path = os.environ.get("LLMKERN_LIBRARY")
    if not path:
        from llmkern import _C  # type: ignore[attr-defined]

        return _C
    spec = importlib.util.spec_from_file_location("llmkern._C", path)
    if spec is None or spec.loader is None or not os.path.exists(path):
        raise ImportError(f"LLMKERN_LIBRARY: expected the path of a compiled library, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refuse_setting(name: str, choices: Sequence[str], value: str) -> NoReturn:
    """Raises ValueError for a value of an environment variable that is none of its choices."""
    message = f"{name}: expected one of {', '.join(choices)}, got {value!r}"
    # `python -m llmkern` imports the package, under this name, before any code of its own can catch what is raised.
    if getattr(sys, "argv", [])[:1] == ["-m"]:
        raise SystemExit(message)
    raise ValueError(message)


try:
    # After torch, whose OpenMP threads the library looks up and shares.
    _C = _load()
except ImportError as error:
    MISSING = (
        f"the compiled library llmkern._C is not there ({error}): run `pip install -e .` in the repository, "
        "with a C++17 compiler"
    )
else:
    if _isa := os.environ.get("LLMKERN_ISA"):
        if _isa not in _C.supported_isas():
            refuse_setting("LLMKERN_ISA", _C.supported_isas(), _isa)
        _C.force_isa(_isa)
    SHORT_CALLS = _C.connect(
        torch.Tensor, torch.nn.Parameter, torch.is_grad_enabled, forward_ad,
        (torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack, torch._C._is_any_autocast_enabled,
         torch._C._functorch.maybe_current_level, torch._C._get_tracing_state),
        getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
    )  # fmt: skip

#: How many threads a kernel may use now: torch's own setting.
threads = torch.get_num_threads


def address(x: torch.Tensor | None) -> int:
    """Of a tensor's first element, 0 where there is none: what kernels take that read no tensors themselves."""
    return 0 if x is None else x.data_ptr()


def missing(*args: Any) -> str | None:
    """Why a compiled kernel that takes every call cannot serve these arguments; None where the library is there."""
    return MISSING
