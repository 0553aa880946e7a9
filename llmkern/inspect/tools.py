"""The programs that the inspector calls: nvcc for CUDA C++, cuobjdump for the machine code."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from llmkern.inspect.errors import InspectError

HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")


@lru_cache(maxsize=1)
def nvcc() -> str:
    """The nvcc of LLMKERN_NVCC, PATH or CUDA_HOME, as setup.py looks for it."""
    named = os.environ.get("LLMKERN_NVCC")
    found = shutil.which(named) if named else shutil.which("nvcc") or shutil.which("nvcc", path=f"{HOME}/bin")
    if not found:
        raise InspectError(
            "no nvcc was found, which compiles the CUDA C++ kernels: install a CUDA toolkit, 12.8 or newer, and put "
            "its nvcc on PATH (or set LLMKERN_NVCC or CUDA_HOME); --source triton inspects the Triton kernels alone"
        )
    return found


@lru_cache(maxsize=1)
def cuobjdump() -> str:
    """The one of PATH or CUDA_HOME, or the one that Triton brings."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=f"{HOME}/bin")
    triton = importlib.util.find_spec("triton")
    if not found and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends/nvidia/bin"))
    if not found:
        raise InspectError(
            "no cuobjdump was found, which shows machine code: it is part of a CUDA toolkit, and of Triton "
            "(`pip install triton`)"
        )
    return found


def run(what: str, command: list[str]) -> tuple[str, str]:
    """stdout and stderr of a program; an InspectError with its first errors where it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)] or lines
        raise InspectError(f"{what} does not compile:\n  " + "\n  ".join(errors[:5] or ["(it says nothing)"]))
    return result.stdout, result.stderr


def dump(cubin: Path, option: str) -> str:
    """What cuobjdump prints of a cubin: option "-sass" or "--dump-resource-usage"."""
    return run(f"cuobjdump {option} of {cubin.name}", [cuobjdump(), option, str(cubin)])[0]


@lru_cache(maxsize=4096)
def demangle(name: str) -> str:
    """A C++ name as written in C++, by the C++ runtime library, which torch has loaded; `name` itself where none is."""
    for library in ("libstdc++.so.6", "libc++abi.so.1", "libc++abi.dylib"):
        try:
            function = ctypes.CDLL(library).__cxa_demangle
        except (OSError, AttributeError):
            continue
        function.restype, status = ctypes.c_void_p, ctypes.c_int()
        address = function(name.encode(), None, None, ctypes.byref(status))
        if not address:
            return name
        text = ctypes.string_at(address).decode()
        free = ctypes.CDLL(None).free
        free.argtypes = [ctypes.c_void_p]
        free(address)
        return text
    return name


def short_name(mangled: str) -> tuple[str, str]:
    """A kernel's name, without namespaces, and its template arguments: ("rotary_kernel", "float, true")."""
    text = demangle(mangled).replace("(anonymous namespace)::", "").replace("llmkern::", "")
    name = re.split(r"[<(]", text, maxsplit=1)[0]
    depth, arguments = 0, ""
    for character in text[len(name) :]:
        depth += {"<": 1, ">": -1}.get(character, 0)
        if depth == 0:
            break
        arguments += character
    return re.split(r"\s|::", name)[-1], arguments[1:]
