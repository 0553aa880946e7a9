"""What Triton makes of a launch for gfx942, AMD's MI300: compiled, not run."""

from __future__ import annotations

import re

import pytest

from llmkern import triton


def gfx942(launch: triton.Launch) -> str:
    """The machine code, of which is asserted that it spills nothing and that a block fits."""
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    from llmkern.inspect.triton_source import Compilation, compiled

    made = compiled(Compilation.of(launch, "as launched"), "gfx942")
    code: str = made.asm["amdgcn"]
    assert re.findall(r"\.vgpr_spill_count: *(\d+)", code) == ["0"], launch.kernel
    assert made.metadata.shared <= 64 << 10, launch.kernel
    return code
