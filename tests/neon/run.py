"""Runs the kernels' tests with the NEON code, on a processor that has none.

    python tests/neon/run.py pytest arguments

The kernels and driver.cpp become an AArch64 program, which QEMU runs; register.cpp and bridge.cpp become the library
that the tests load, whose kernels are calls of that program. Needs g++-aarch64-linux-gnu and qemu-user-static.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "neon"
CROSS = "aarch64-linux-gnu-g++"
# Those of setup.py; of its warnings none is left out, since this compiler raises none falsely.
BYTE_SOURCES = ("common/cpu_roofline.cpp", "int8/cpu.cpp")  # as in setup.py
FLAGS = "-O3 -std=c++17 -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra -Werror"

# Loops that store zeros stay loops. As calls of memset they lose bytes where a page is fetched in the middle: QEMU 7.2
# does not begin the instruction `dc zva` of the C library anew behind a signal handler.
DRIVER_FLAGS = "-fno-tree-loop-distribute-patterns"

NO_MEMORY = """
import torch
from llmkern import extension
assert extension._C.active_isa() == "neondot"
x, pe, out = torch.ones(4, 1, 64), torch.ones(4, 64), torch.empty(4, 1, 64)
sizes = (4, 1, 64, 64, 64, 64, 64, 64, 1.0, 0, 1)
try:
    extension._C.sinusoidal_add(x.data_ptr(), 1 << 16, out.data_ptr(), *sizes)
except RuntimeError as error:
    assert "at 0x10000" in str(error), error
    extension._C.sinusoidal_add(x.data_ptr(), pe.data_ptr(), out.data_ptr(), *sizes)
    assert (out == 2).all()
    print("neon: a read from an address without memory was caught, and the next call served; now the tests", flush=True)
"""


def build() -> None:
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    lines = [
        f"rule driver\n  command = {CROSS} {FLAGS} {DRIVER_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc\n  depfile = $out.d\n  description = C++ for AArch64 $out",
        f"rule bridge\n  command = {shlex.join(cxx)} {FLAGS} -fPIC -DLLMKERN_AS_AARCH64 $flags -MMD -MF $out.d -c $in"
        " -o $out",
        "  deps = gcc\n  depfile = $out.d\n  description = C++ $out",
        # Without the loader, which would have to find AArch64 libraries; whole, as weak symbols of threads ask for.
        f"rule program\n  command = {CROSS} -static -o $out $in -Wl,--whole-archive -lpthread -Wl,--no-whole-archive",
        f"rule library\n  command = {shlex.join(cxx)} -shared -o $out $in -ldl -lpthread",
    ]
    outputs: dict[str, list[str]] = {"driver": [], "bridge": []}

    def compile(rule: str, source: Path, name: str, flags: str = "") -> None:
        outputs[rule].append(f"{name}.o")
        place = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines.append(f"build {name}.o: {rule} {place}\n  flags = {flags}")

    csrc = ROOT / "csrc"
    for source in sorted(csrc.glob("*/cpu*.cpp")):
        isas = {"neon": "", "portable": ""}
        if str(source.relative_to(csrc)) in BYTE_SOURCES:
            isas["neondot"] = "-march=armv8.2-a+dotprod"
        for isa, isa_flags in isas.items():
            compile("driver", source, f"{source.parent.name}.{source.stem}.{isa}", f"-DLLMKERN_ISA={isa} {isa_flags}")
    include = shlex.join(["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")])
    missing = "-DLLMKERN_CUDA_MISSING='\"tests/neon leaves them out\"'"
    for rule in ("driver", "bridge"):
        for name in ("dispatch", "parallel"):
            compile(rule, csrc / "common" / f"{name}.cpp", f"{rule}.{name}")
        compile(rule, ROOT / "tests" / "neon" / f"{rule}.cpp", rule)
    compile("bridge", csrc / "register.cpp", "register", f"{include} {missing}".replace("$", "$$"))
    lines.append(f"build driver: program {' '.join(outputs['driver'])}")
    lines.append(f"build _C.so: library {' '.join(outputs['bridge'])}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([sys.executable, "-m", "ninja", "-C", FOLDER], check=True)


def main() -> int:
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    absent = [
        f"{what} ({package})"
        for what, package, found in (
            (CROSS, "g++-aarch64-linux-gnu", shutil.which(CROSS)),
            ("qemu-aarch64-static", "qemu-user-static", qemu),
        )
        if not found
    ]
    if absent:
        print(f"neon: not found: {', '.join(absent)}", file=sys.stderr)
        return 1
    if platform.machine() != "x86_64":
        print(f"neon: expected an x86-64 processor to run QEMU on, got {platform.machine()}", file=sys.stderr)
        return 1
    build()
    env = {
        **os.environ,
        "LLMKERN_LIBRARY": str(FOLDER / "_C.so"),
        "LLMKERN_NEON_QEMU": str(qemu),
        "LLMKERN_NEON_DRIVER": str(FOLDER / "driver"),
        "LLMKERN_TEST_ISAS": os.environ.get("LLMKERN_TEST_ISAS", "neon"),
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([sys.executable, "-c", NO_MEMORY], env=env, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
