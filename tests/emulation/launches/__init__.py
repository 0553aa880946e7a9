"""A family's C++ launcher, run to the end: its launches go to the PTX emulator instead of to a GPU.

The .cu file is compiled for the host as ever and linked with runtime.cpp, which stands in for the CUDA runtime, and
with a few lines of C++ that fill the launcher's struct (attention_sm90.cpp).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.emulation import compilers
from tests.emulation.ptx.launch import Launch, Report, find, run
from tests.emulation.ptx.parse import parse

FOLDER = Path(__file__).parent
LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip

# : Where the libraries lie, until Python ends.
BUILT = tempfile.TemporaryDirectory(prefix="llmkern-launches-")


@lru_cache(maxsize=8)
def library(source: Path, caller: str, architecture: str, defines: tuple[str, ...] = ()) -> Path:
    """The .cu file with its caller, a file of this folder, for ctypes.CDLL. Its PTX is compiled, and not used."""
    out = Path(tempfile.mkdtemp(dir=BUILT.name)) / "launch.so"
    code = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    # A copy of the library has variables of its own : neither joined by their names nor taken from the real runtime.
    flags = ["-std=c++17", "-O1", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-fno-gnu-unique"]
    flags += ["-Xlinker", "-Bsymbolic"]
    sources = [source, FOLDER / "runtime.cpp", FOLDER / caller]
    command = [compilers.NVCC, *flags, code, *(f"-D{d}" for d in defines), *sources, "-o", out]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return out


class Emulated:
    """While it is entered, launches of `library` are executed with the buffers of `launch`; `reports` has theirs."""

    def __init__(self, library: ctypes.CDLL, ptx: str, launch: Launch, old_driver: bool = False) -> None:
        self.library, self.ptx, self.launch, self.old_driver = library, ptx, launch, old_driver
        self.reports: list[Report] = []
        self.error: BaseException | None = None
        self.callback = LAUNCHED(self._launched)

    def __enter__(self) -> Emulated:
        self.library.use(self.callback, ctypes.c_bool(self.old_driver))
        return self

    def __exit__(self, *_: Any) -> None:
        if self.error is not None:  # ctypes lets none through
            raise self.error

    def _launched(self, name: bytes, grid: Any, block: Any, shared_bytes: int, _: Any, arguments: Any) -> int:
        try:
            # What stands before is the file's own namespace, whose name is another in each compilation.
            kernel = find(self.ptx, re.sub(r".*_cu_[0-9a-f]{8}", "", name.decode()))
            sizes = [p.size or 0 for p in parse(self.ptx)[kernel].parameters]
            raw = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)]
            options = {"shared_bytes": shared_bytes, "launch": self.launch}
            self.reports.append(run(self.ptx, kernel, grid[:3], block[:3], raw, **options))
        except BaseException as error:
            self.error = error
        return 0
