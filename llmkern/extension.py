"""The compiled library, and what the Python side must know to call it."""

from __future__ import annotations

import os
from typing import Any

import torch

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
#: Why the compiled library is missing; None where it is there.
MISSING: str | None = None

try:
    # After torch, whose OpenMP threads the library looks up and shares.
    from llmkern import _C  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    MISSING = (
        f"the compiled library llmkern._C is not there ({error}): run `pip install -e .` in the repository, "
        "with a C++17 compiler"
    )
else:
    if os.environ.get("LLMKERN_ISA"):
        _C.force_isa(os.environ["LLMKERN_ISA"])

#: How many threads a kernel may use now: torch's own setting.
threads = torch.get_num_threads
