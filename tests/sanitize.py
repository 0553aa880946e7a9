"""Runs the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [pytest arguments]

Builds the CPU part with both into a folder of its own (the installed library stays), shows on a deliberate overflow
that a write outside a tensor is caught, and runs the tests of every family with that library.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Not the GPU kernels' tests, which bring libraries of their own.
IGNORED = ["--ignore-glob=*test_triton.py", "--ignore-glob=*test_cuda*.py"]
IGNORED += [f"--ignore=tests/int8/test_{name}.py" for name in ("lora", "packing", "packing_threads", "portability")]
# Those of the kernels, without those of what Python does around the int8 ones.
FAMILIES = [
    "tests/activation",
    "tests/attention",
    "tests/int8",
    "tests/loss",
    "tests/norm",
    "tests/positional",
    *IGNORED,
]

OVERFLOW = """
import torch
from llmkern import extension
x, pe, out = torch.ones(4, 1, 64), torch.ones(4, 64), torch.empty(4 * 64 - 1)
extension._C.sinusoidal_add(x.data_ptr(), pe.data_ptr(), out.data_ptr(), 4, 1, 64, 64, 64, 64, 64, 64, 1.0, 0, 1)
"""


def main() -> int:
    build_env = {**os.environ, "LLMKERN_SANITIZE": "address,undefined", "LLMKERN_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext"], cwd=ROOT, env=build_env, check=True)
    library = next((ROOT / "build").glob("*-address-undefined/_C*.so"))
    compiler = os.environ.get("CXX", "g++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        **os.environ,
        "LLMKERN_LIBRARY": str(library),
        "LD_PRELOAD": ":".join(runtimes),
        # Python and torch keep memory until the end of the process; new[] against free is torch's own affair.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
    }
    caught = subprocess.run([sys.executable, "-c", OVERFLOW], env=env, capture_output=True, text=True)
    if caught.returncode == 0 or "ERROR: AddressSanitizer" not in caught.stderr:
        print(caught.stderr, file=sys.stderr)
        print("sanitize: a write outside a tensor was not caught: the sanitizers do not work here", file=sys.stderr)
        return 1
    print("sanitize: a deliberate write outside a tensor was caught; now the tests", flush=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", *sys.argv[1:]]
    if not any(a.startswith("tests") for a in sys.argv[1:]):
        command += FAMILIES
    return subprocess.run(command, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
