"""One instruction set forced on llmkern and on torch alike, as on a processor that has no better one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from llmkern import extension

#: What keeps torch and the libraries in it from better instructions than these. They read it as they are loaded.
TORCH = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}


def choices() -> list[str]:
    """The instruction sets that this processor and this build have, best first."""
    return extension._C.supported_isas() if extension._C else []


def settings(isa: str) -> dict[str, str]:
    """The environment of a process whose llmkern and torch use `isa`. Raises ValueError for one that is not there."""
    if isa not in choices():
        raise ValueError(
            f"isa: expected one of {', '.join(choices()) or 'none, without the compiled library'}, got {isa!r}"
        )
    return {"LLMKERN_ISA": isa, **TORCH.get(isa, {})}


def elsewhere(module: str, arguments: Sequence[str], isa: str) -> int | None:
    """Runs `python -m module arguments` in a process with the settings of `isa`, and returns its exit status.

    None where this process has them already: the caller then goes on itself.
    """
    wanted = settings(isa)
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return None
    return subprocess.run([sys.executable, "-m", module, *arguments], env={**os.environ, **wanted}).returncode
