"""The build: what the objects define, what a change recompiles, what a failure says, and the library without torch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmkern import extension

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(extension._C.__file__)


def object_folder() -> Path:
    """The build folder that the library in use came from."""
    folders = [p for p in (ROOT / "build").glob("*/build.ninja") if (p.parent / LIBRARY.name).exists()]
    same = [p.parent for p in folders if (p.parent / LIBRARY.name).read_bytes() == LIBRARY.read_bytes()]
    assert same, "no build folder holds this library: run `pip install -e .` again"
    return same[0]


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm, of binutils")
def test_objects_define_nothing_outside_their_instruction_sets_namespace():
    """A weak one would be merged across instruction sets, and its AVX-512 body could serve the portable path."""
    isas = extension._C.built_isas()
    objects = [o for o in object_folder().glob("*.*.*.o") if o.stem.rsplit(".")[-1] in isas]
    assert len(objects) >= 3 * len(isas)
    for path in objects:
        isa = path.stem.rsplit(".")[-1]
        for line in run("nm", "-C", "--defined-only", path).stdout.splitlines():
            _, kind, name = re.match(r"(\S*) +(\w) (.*)", line).groups()
            if kind in "TWVuBDRSG" and not name.startswith("DW.ref."):
                assert f"llmkern::{isa}::" in name, f"{path.name} defines {name} ({kind})"


def would_compile(folder: Path) -> list[str]:
    plan = run(sys.executable, "-m", "ninja", "-C", folder, "-n", "-v")
    assert plan.returncode == 0, plan.stderr
    return re.findall(r" -o (\S+\.o)$", plan.stdout, re.MULTILINE)


@pytest.mark.parametrize("source", ["csrc/common/dispatch.cpp", "csrc/positional/cpu.cpp", "csrc/register.cpp"])
def test_a_changed_source_recompiles_its_own_objects_only(source):
    folder, path = object_folder(), ROOT / source
    before = path.stat()
    try:
        assert would_compile(folder) == []
        os.utime(path)
        changed = would_compile(folder)
    finally:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    isas = extension._C.built_isas()
    expected = {
        "csrc/common/dispatch.cpp": ["common.dispatch.o"],
        "csrc/positional/cpu.cpp": [f"positional.cpu.{isa}.o" for isa in isas if extension._C.isa_base(isa) == isa],
        "csrc/register.cpp": ["register.o"],
    }
    assert sorted(changed) == sorted(expected[source])


@pytest.fixture
def sources(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "llmkern").mkdir()
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    return tmp_path


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"CXX": "false", "LLMKERN_CUDA": "0"}, ["did not compile", "C++17", "CXX"]),
        ({"LLMKERN_CUDA": "yes"}, ["LLMKERN_CUDA", "auto, 0 or 1", "'yes'"]),
        ({"LLMKERN_CUDA": "1", "PATH": "", "CUDA_HOME": "/nowhere"}, ["LLMKERN_CUDA=1", "nvcc", "LLMKERN_NVCC"]),
        ({"CXX": "", "PATH": "", "LLMKERN_CUDA": "0"}, ["no C++ compiler", "g++", "CXX"]),
        ({"CXX": "/nowhere/c++ -m64", "LLMKERN_CUDA": "0"}, ["CXX: expected a C++ compiler", "'/nowhere/c++ -m64'"]),
        ({"LLMKERN_NVCC": "/nowhere"}, ["LLMKERN_NVCC: expected the path of an nvcc", "'/nowhere'"]),
        ({"LLMKERN_NVCC": "true", "LLMKERN_CUDA_ARCHS": ""}, ["LLMKERN_CUDA_ARCHS: expected architectures", "''"]),
        (
            {"LLMKERN_NVCC": "true", "LLMKERN_CUDA_ARCHS": "90 75"},
            ["LLMKERN_CUDA_ARCHS: expected architectures from 80 on, which the kernels need", "'90 75'"],
        ),
        ({"LLMKERN_CUDA": "0", "LLMKERN_JOBS": "x"}, ["LLMKERN_JOBS: expected a positive integer", "'x'"]),
    ],
)
def test_a_failed_build_says_what_to_do(sources, env, words):
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=sources, env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode != 0
    assert all(word in build.stderr for word in words), build.stderr
    assert not list(sources.rglob("*.so")), "a failed build must leave no library"


# What ninja asks of a compiler and no more: it makes the file after -o, says nothing of what it read.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do case "$1" in -o) : > "$2"; made=$2;; -MF) : > "$2";; -DLLMKERN_TEST) flag=1;; esac; shift; done
[ "$flag" ] && [ "$made" ]
"""


def test_a_folder_and_a_compiler_with_spaces(tmp_path):
    """CXX may carry flags; the sources, and so the commands, may lie anywhere."""
    root = tmp_path / "a $place: of one's own"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root)
    (root / "llmkern").mkdir()
    (root / "compiler").write_text(COMPILER)
    (root / "compiler").chmod(0o755)
    env = {**os.environ, "CXX": f"{shlex.quote(str(root / 'compiler'))} -DLLMKERN_TEST", "LLMKERN_CUDA": "0"}
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=root, env=env, capture_output=True, text=True
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    assert list((root / "build").rglob("_C*.so"))


# An nvcc of the same kind, which knows the targets that it is told.
NVCC = """#!/bin/sh
case "$*" in *sm_90a*) [ "$KNOWS_90A" ] || exit 1;; esac
while [ $# -gt 0 ]; do case "$1" in
  -o) [ "$2" = /dev/null ] || : > "$2";; -MF) : > "$2";; *.cu) [ -z "$one" ] || exit 1; one=$1;;
esac; shift; done
"""


@pytest.mark.parametrize(("architectures", "knows"), [("80 90", "1"), ("80 100", "1"), ("90a", "1"), ("80 90", "")])
def test_what_hopper_alone_has_is_compiled_for_it_alone(tmp_path, architectures, knows):
    """csrc/*/cuda_sm90*.cu: for sm_90a, where 90 is asked for and nvcc knows it; all others see whether they are."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "llmkern").mkdir()
    for name, text in (("compiler", COMPILER), ("nvcc", NVCC)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ, "CXX": f"{tmp_path / 'compiler'} -DLLMKERN_TEST", "LLMKERN_NVCC": str(tmp_path / "nvcc"),
        "LLMKERN_CUDA": "1", "LLMKERN_CUDA_ARCHS": architectures, "KNOWS_90A": knows,
    }  # fmt: skip
    command = [sys.executable, "setup.py", "build_ext"]
    build = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    lines = next((tmp_path / "build").rglob("build.ninja")).read_text().splitlines()
    commands = {rule: lines[lines.index(f"rule {rule}") + 1] for rule in ("nvcc", "nvcc_sm90")}
    rules = {rule for line in lines for name, rule in re.findall(r"build (\S+)\.o: (\w+)", line) if "cuda_sm90" in name}
    there = "90" in architectures and bool(knows)
    assert rules == ({"nvcc_sm90"} if there else set())
    assert re.findall(r"-gencode=(\S+)", commands["nvcc_sm90"]) == ["arch=compute_90a,code=sm_90a"]
    (generic,) = re.findall(r"arch=compute_(\d+),code=\[(\S+)\]", commands["nvcc"])
    named = architectures.split()
    oldest = named[0].rstrip("a")  # whose PTX is assembled for all, and kept
    assert generic == (oldest, ",".join([*(f"sm_{a}" for a in named), f"compute_{oldest}"]))
    registered = next(lines[i + 1] for i, line in enumerate(lines) if line.startswith("build register.o"))
    assert all(("-DLLMKERN_SM90" in text) == there for text in (commands["nvcc"], registered))


WITHOUT_TORCH = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("llmkern._C", sys.argv[1])
C = importlib.util.module_from_spec(spec); spec.loader.exec_module(C)
assert "torch" not in sys.modules and C.parallel_source() == "a thread pool of llmkern", C.parallel_source()
x = np.random.default_rng(0).standard_normal((501, 3, 77), dtype=np.float32)
pe = np.random.default_rng(1).standard_normal((501, 77), dtype=np.float32)
for threads in (1, 2, 3, 7, 2):
    for _ in range(20):
        out = np.full_like(x, np.nan)
        addresses = [a.ctypes.data for a in (x, pe, out)]
        C.sinusoidal_add(*addresses, 501, 3, 77, 231, 77, 77, 231, 77, 1.0, 0, threads)
        assert np.array_equal(out, x + pe[:, None])
"""


def test_without_torchs_openmp_a_pool_of_our_own_serves():
    result = run(sys.executable, "-c", WITHOUT_TORCH, LIBRARY)
    assert result.returncode == 0, result.stderr


def test_dtype_codes_are_those_of_the_kernels():
    codes = dict(re.findall(r"(\w+) = (\d+)", (ROOT / "csrc/common/types.h").read_text()))
    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "i8", "uint8": "u8", "int32": "i32",
             "int64": "i64", "bool": "boolean"}  # fmt: skip
    ours = {names[str(d).removeprefix("torch.")]: str(code) for d, code in extension.DTYPE_CODES.items()}
    assert ours == codes


def test_an_instruction_set_is_forced_by_name():
    assert (
        run(
            sys.executable,
            "-c",
            "from llmkern import extension; print(extension._C.active_isa())",
            LLMKERN_ISA="portable",
        ).stdout.strip()
        == "portable"
    )
    wrong = run(sys.executable, "-c", "import llmkern.extension", LLMKERN_ISA="sse9")
    assert wrong.returncode != 0
    assert "expected one of" in wrong.stderr and "portable" in wrong.stderr and "'sse9'" in wrong.stderr


FRESH = """
import sys, torch
before = set(sys.modules)
import llmkern
new = {m.split(".")[0] for m in set(sys.modules) - before}
assert not new & {"triton", "transformers", "matplotlib"}, new
"""


def test_import_loads_neither_triton_nor_transformers():
    result = run(sys.executable, "-c", FRESH)
    assert result.returncode == 0, result.stderr
