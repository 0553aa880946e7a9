"""What the compilers make of the kernels, without a GPU: `python -m llmkern inspect` (docs/inspect.md).

Nothing of it is imported with llmkern.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from llmkern.inspect import amd, cuda_source, triton_source
from llmkern.inspect.errors import InspectError
from llmkern.inspect.limits import LIMITS, base
from llmkern.inspect.row import Row

SOURCES = ("cuda", "triton")
TARGETS = (*LIMITS, *amd.LIMITS)


def inspect(
    targets: Sequence[str] = TARGETS,
    kernel: str | None = None,
    sources: Sequence[str] = SOURCES,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> list[Row]:
    """Compiles the kernels for each target ("sm_80", ..., "gfx942", for which there are no CUDA kernels) and looks at
    the code.

    kernel: those alone whose name holds this text. progress(done, total, label) is called after each compilation.
    Raises InspectError: an unknown target or kernel, a missing compiler, a kernel that does not compile.
    """
    wanted = list(dict.fromkeys(_base(target) for target in targets))
    of_nvidia = [target for target in wanted if target in LIMITS]
    every: list[cuda_source.Job | triton_source.Job] = []
    if "triton" in sources:
        if tuple(sources) == ("triton",) and not triton_source.installed():
            raise InspectError("Triton is not installed: `pip install triton` (it exists for Linux)")
        every += triton_source.jobs(wanted)
    if "cuda" in sources and of_nvidia:
        every += cuda_source.jobs(of_nvidia)
    jobs = [j for j in every if kernel is None or any(kernel in name for name in j.kernels())]
    if not jobs:
        known = sorted({name for j in every for name in j.kernels()})
        raise InspectError(f"kernel: expected a part of the names {', '.join(known)}, got {kernel!r}")
    rows: list[Row] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(job.rows): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(running), 1):
                rows += future.result()
                progress(done, len(jobs), running[future].label)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = [r for r in rows if kernel is None or kernel in r.kernel]
    return sorted(found, key=lambda r: (r.source, r.kernel, r.config, TARGETS.index(_base(r.target))))


def _base(target: str) -> str:
    if target in amd.LIMITS:
        return target
    try:
        return base(target)
    except InspectError:
        raise InspectError(f"target: expected some of {', '.join(TARGETS)}, got {target!r}") from None
