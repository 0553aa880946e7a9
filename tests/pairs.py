"""Runs the interpreter's tests of the Triton kernels on the oldest and the newest pair of torch and Triton.

    python tests/pairs.py [--pair TORCH TRITON NUMPY ...] [--folder FOLDER] [--index-url URL]

Each pair gets a virtual environment of its own under a temporary folder, with torch's CPU build. "newest" is what pip
finds. A pair that cannot be installed counts as failed, and the output says what pip said; none stands for another.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The oldest that pyproject.toml allows, and the newest; torch stays at what the build is tested with. numpy goes with
#: them: Triton 3.6's interpreter makes integers of arrays of one element, which numpy 2.4 refuses.
PAIRS = (("2.11.0", "3.6.0", "2.2.6"), ("2.13.0", "newest", "newest"))
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
TESTS = tuple(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/*/test_triton*.py")))
#: What torch's CPU build and the tests need besides.
OTHERS = (
    "typing_extensions", "filelock", "sympy", "networkx", "jinja2", "fsspec", "pytest", "tqdm", "hypothesis",
    "setuptools",
)  # fmt: skip


def requirement(name: str, version: str) -> str:
    return name if version == "newest" else f"{name}=={version}"


def installations(python: str, torch: str, triton: str, numpy: str, index_url: str) -> list[list[str]]:
    """The commands that fill an environment. torch comes without what it depends on: its CUDA build, which an index may
    offer in place of the CPU's, would bring gigabytes; and it asks for a Triton of its own."""
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    return [
        [*pip, "--no-deps", "--index-url", index_url, requirement("torch", torch)],
        [*pip, "--no-deps", requirement("triton", triton)],
        [*pip, requirement("numpy", numpy), *OTHERS],
    ]


def run_pair(torch: str, triton: str, numpy: str, folder: Path, index_url: str) -> str | None:
    """Installs and tests one pair. Returns why it failed, or None."""
    environment = folder / f"torch-{torch}-triton-{triton}"
    python = str(environment / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    for command in installations(python, torch, triton, numpy, index_url):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command[2:])} failed:\n{(done.stderr or done.stdout).strip()[-1500:]}"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "LLMKERN_"))}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(environment / "triton")}
    told = subprocess.run(
        [python, "-c", "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"],
        env=env, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if told.returncode:
        return f"they do not load:\n{told.stderr.strip()[-1500:]}"
    print(told.stdout.strip(), flush=True)
    failed = []
    for path in TESTS:
        if subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", path], env=env, cwd=ROOT).returncode:
            failed.append(path)
    return f"tests failed: {', '.join(failed)}" if failed else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/pairs.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--pair", nargs=3, action="append", metavar=("TORCH", "TRITON", "NUMPY"), help="default: both pairs"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the environments are made and stay; default: a temporary one"
    )
    parser.add_argument("--index-url", default=CPU_BUILDS, help=f"where torch comes from; default {CPU_BUILDS}")
    options = parser.parse_args(argv)
    results: dict[tuple[str, str], str | None] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for torch, triton, numpy in options.pair or PAIRS:
            print(f"== torch {torch}, triton {triton}, numpy {numpy}", flush=True)
            folder = options.folder or Path(temporary)
            results[torch, triton] = run_pair(torch, triton, numpy, folder, options.index_url)
    for (torch, triton), reason in results.items():
        print(f"torch {torch}, triton {triton}: {reason or 'passed'}")
    return 1 if any(results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
