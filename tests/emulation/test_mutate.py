"""The mutator: its lexer, the mutants it makes, and a small run of it from end to end."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation import compilers, cuda_launches
from tests.emulation.mutate import __main__ as command
from tests.emulation.mutate import cuda_source, equivalent, judge, lexer, planted, process, targets, triton_source
from tests.emulation.mutate.cache import Cache
from tests.emulation.mutate.faults.fault import Planted
from tests.emulation.mutate.judge import Verdict
from tests.emulation.mutate.report import Results, words

KERNEL = """
// a + b in a comment
#define SUM(a, b) (a + b)
#ifdef __CUDACC__
__device__ int on_the_gpu(int a) { return a + 1; }
#else
__device__ int on_the_host(int a) { return a - 7; }
#endif
inline int host(int a) { return a * 2; }
template <class T, bool kAligned>
LLMKERN_DEVICE void read(const T* p, float* out, int n = 3);
template <class T>
__global__ void __launch_bounds__(128) kernel(const T* x, float* out, int n) {
  static_assert(sizeof(T) + 1 > 2, "a < b");
  const T* p = x;
  for (int i = 0; i < n; i++) out[i] = read<T, true>(p);
  if (n == 0x10u) __syncthreads();
  asm volatile("bar.sync 0;" ::: "memory");
  float y = n ? -out[0] : 2.5f;
}
"""


def made(text: str) -> set[tuple[str, str, str]]:
    return {(m.operator, m.before, m.after) for m in cuda_source.mutants("k.cu", text)}


def test_the_lexer_finds_device_code_alone():
    source = lexer.Source(KERNEL)
    assert [f.name for f in source.functions] == ["on_the_gpu", "kernel"]
    texts = [t.text for t in source.tokens]
    assert '"bar.sync 0;"' in texts and "0x10u" in texts and "SUM" not in texts and "comment" not in texts
    assert "on_the_host" not in texts and source.line(source.tokens[0].start) == 5


def test_the_lexer_tells_operators_from_brackets_and_pointers():
    spaced = [t.text for t in lexer.Source(KERNEL).tokens if t.spaced and t.kind == "operator"]
    assert {"+", "<", "==", "?", ":"} <= set(spaced) and spaced.count("<") == 1 and ">" not in spaced[1:2]


def test_unbalanced_brackets_are_an_error():
    for text in ("__device__ void f() { (", "__device__ void f() { ) }"):
        with pytest.raises(ValueError, match=r"never closed|closes nothing"):
            lexer.Source(text)


def test_what_is_made_of_cuda():
    loop = "for (int i = 0; i < n; i++) out[i] = read<T, true>(p);"
    assert made(KERNEL) == {
        ("arithmetic", "__device__ int on_the_gpu(int a) { return a + 1; }",
         "__device__ int on_the_gpu(int a) { return a - 1; }"),
        ("constant", "__device__ int on_the_gpu(int a) { return a + 1; }",
         "__device__ int on_the_gpu(int a) { return a + 2; }"),
        ("constant", "__device__ int on_the_gpu(int a) { return a + 1; }",
         "__device__ int on_the_gpu(int a) { return a + 0; }"),
        ("constant", loop, loop.replace("= 0", "= 1")),
        ("comparison", loop, loop.replace("<", "<=", 1)),
        ("index", loop, loop.replace("[i]", "[i ^ 1]")),
        ("word", loop, loop.replace("true", "false")),
        ("statement", loop, "for (int i = 0; i < n; i++) ;"),
        ("condition", "if (n == 0x10u) __syncthreads();", "if (!(n == 0x10u)) __syncthreads();"),
        ("comparison", "if (n == 0x10u) __syncthreads();", "if (n != 0x10u) __syncthreads();"),
        ("constant", "if (n == 0x10u) __syncthreads();", "if (n == 0x11u) __syncthreads();"),
        ("statement", "if (n == 0x10u) __syncthreads();", "if (n == 0x10u) ;"),
        ("statement", 'asm volatile("bar.sync 0;" ::: "memory");', ";"),
        ("condition", "float y = n ? -out[0] : 2.5f;", "float y = !(n) ? -out[0] : 2.5f;"),
        ("sign", "float y = n ? -out[0] : 2.5f;", "float y = n ? out[0] : 2.5f;"),
        ("constant", "float y = n ? -out[0] : 2.5f;", "float y = n ? -out[1] : 2.5f;"),
        ("constant", "float y = n ? -out[0] : 2.5f;", "float y = n ? -out[0] : -2.5f;"),
        ("constant", "float y = n ? -out[0] : 2.5f;", "float y = n ? -out[0] : 0.0f;"),
    }  # fmt: skip


def test_what_is_made_of_triton():
    text = (
        "import triton\n\ndef host(a):\n    return a + 1\n\n@triton.jit\ndef kernel(x, n):\n    \"ä\"\n"
        "    at = tl.arange(0, 4) * 2\n    tl.store(x + at, 1.5, mask=(at < n) & (at >= 0))\n"
    )  # fmt: skip
    mutants = list(triton_source.mutants("k.py", text))
    after = {m.after for m in mutants}
    assert {
        "at = (tl.arange(0, 4) + 2)",
        "pass",
        "tl.store(x + at, 1.5)",
        "tl.store(x + at, -1.5, mask=(at < n) & (at >= 0))",
    } <= after
    assert all(m.function == "kernel" and m.line > 7 for m in mutants)
    assert all(ast.dump(ast.parse(m.apply(text))) != ast.dump(ast.parse(text)) for m in mutants)


@pytest.fixture(scope="module")
def everything():
    return command.collect(targets.files())


def test_every_mutant_of_the_kernels_can_be_read(everything):
    """There are at least a hundred, each another text; brackets stay in pairs, Python stays Python: a part is read."""
    texts = {f: (targets.ROOT / f).read_text() for f in targets.files()}
    assert len({(m.file, m.apply(texts[m.file])) for m in everything}) == len(everything) >= 100
    for mutant in everything[::20]:
        text = mutant.apply(texts[mutant.file])
        assert text != texts[mutant.file]
        ast.parse(text) if mutant.file.endswith(".py") else lexer.Source(text)


def test_every_target_has_its_files_and_faults_written_by_hand():
    for target in targets.TARGETS:
        assert (targets.ROOT / target.source).exists()
        assert judge.changed((targets.ROOT / target.source).read_text(), target.only)
        for arguments, _ in [*target.steps(True), *([(target.quick, False)] if target.quick else [])]:
            files = [word for word in arguments.split() if word.endswith(".py")]
            assert files and all((targets.ROOT / f).exists() for f in files)
        assert any(p.file == target.source for p in planted.PLANTED), target.source
    assert "csrc/common/device.cuh" in targets.headers("csrc/positional/cuda.cu")
    assert {p.file for p in planted.PLANTED} <= set(targets.files())


def test_a_fault_written_by_hand_that_no_longer_fits_is_an_error(monkeypatch):
    monkeypatch.setattr(planted, "PLANTED", (Planted("k.cu", "no such text", ""),))
    with pytest.raises(ValueError, match="stands there 0 times"):
        planted.mutants("k.cu", KERNEL)


def test_the_list_of_equivalent_mutants_has_no_stale_entry(everything, monkeypatch, capsys):
    assert equivalent.stale(everything) == []
    assert all(e.reason for e in equivalent.EQUIVALENT)
    mutant = everything[0]
    stale = equivalent.Equivalent(mutant.file, mutant.function, mutant.before, "other", "none")
    monkeypatch.setattr(equivalent, "EQUIVALENT", (stale,))
    assert equivalent.stale(everything) == [stale]
    assert command.main(["--list", "--sample", "1"]) == 1
    assert "listed as equivalent" in capsys.readouterr().err


def test_samples_stay_the_same_when_lines_are_added(everything):
    mutants = list(cuda_source.mutants("k.cu", KERNEL))
    later = list(cuda_source.mutants("k.cu", "\n\n// more\n" + KERNEL))
    drawn = [[(m.before, m.after) for m in command.draw(x, 5, seed=3)] for x in (mutants, later)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5
    assert len(command.draw(everything, 0, 0)) == len(everything)


def test_half_of_a_sample_is_written_by_hand_where_there_are_as_many(everything):
    drawn = command.draw(everything, 21, seed=1)
    assert len(drawn) == 21 and sum(m.operator == "planted" for m in drawn) == 10
    assert set(drawn) < set(command.draw(everything, 40, seed=1))
    by_hand = [m for m in everything if m.operator == "planted"]
    for few in (by_hand[:3] + list(set(everything) - set(by_hand))[:30], by_hand[:30]):
        assert len(command.draw(few, 20, seed=1)) == 20
    assert len(command.draw(by_hand[:5], 20, seed=1)) == 5


@pytest.mark.parametrize(("arguments", "words"), [
    (["--kernel", "nosuch"], "--kernel: no device function's name contains 'nosuch'; there are .*decode_kernel"),
    (["--file", "nosuch"], "--file: no path contains 'nosuch'; there are .*csrc/int8/cuda_tiles.cu"),
    (["--file", "int8", "--file", "nosuch"], "--file: no path contains 'nosuch'"),
    (["--sample", "-3"], "--sample: expected a number from 0 on, got -3"),
    (["--jobs", "0"], "--jobs: expected a number from 1 on, got 0"),
    (["--minutes", "-1"], "--minutes: expected a number from 0 on"),
])  # fmt: skip
def test_arguments_that_choose_nothing_are_errors(arguments, words, tmp_path, capsys):
    for more in (["--list"], ["--json", str(tmp_path / "result.json")]):
        with pytest.raises(SystemExit) as error:
            command.main([*arguments, *more])
        assert error.value.code == 2
        assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "result.json").exists()


def test_ptx_is_the_same_whatever_its_lines_and_path_are():
    here = "\t.loc 1 2 3\nadd.s32 %r1, %r2, %r3;\ncall _GLOBAL__N__80db0f98_7_cuda_cu_c8e02de021f;\n"
    here += ".section .debug_str\n{}"
    there = "add.s32 %r1, %r2, %r3;\ncall _GLOBAL__N__11112222_7_cuda_cu_aaaabbbb21f;\n"
    assert judge.normal(here) == judge.normal(there) != judge.normal(there.replace("add", "sub"))


def test_launchers_are_taken_from_where_they_are_compiled(tmp_path, monkeypatch):
    """With the PTX of the source that has the fault; those of another family, or with a fault of theirs, are built."""
    names = [f"csrc/int8/{source.name}" for source in cuda_launches.sources_of("int8")]
    texts = [f"as it was: {name}" for name in names]
    monkeypatch.setattr(compilers, "nvcc", lambda *arguments: arguments)  # both are what `_use` changes
    monkeypatch.setattr(cuda_launches, "build", lambda *arguments: arguments)
    monkeypatch.setattr(cuda_launches, "load", lambda folder, family: (folder, texts))
    process._use({(names[1], "80"): "with the fault"}, {"int8": tmp_path}, compilers.ROOT)
    folder, found = cuda_launches.build(Path("elsewhere"), "int8")
    assert folder == tmp_path and found == [texts[0], "with the fault", *texts[2:]]
    assert cuda_launches.build(Path("elsewhere"), "other") == (Path("elsewhere"), "other")


def test_the_score_and_the_survivors(everything, monkeypatch):
    kinds = ["caught", "caught", "survived", "survived", "equivalent", "invalid"]
    rows = [(m, Verdict(k, "why", 1.0)) for m, k in zip(everything, kinds, strict=False)]
    listed = rows[3][0]
    entry = equivalent.Equivalent(listed.file, listed.function, listed.before, listed.after, "as the reason says")
    monkeypatch.setattr(equivalent, "EQUIVALENT", (entry,))
    summary = Results(rows).summary()
    assert (summary["planted"], summary["caught"], summary["equivalent"], summary["invalid"]) == (5, 2, 2, 1)
    survivor = rows[2][0]
    assert summary["survivors"] == [
        {"file": survivor.file, "line": survivor.line, "before": survivor.before, "after": survivor.after,
         "reason": "why"}
    ]  # fmt: skip
    assert summary["score"] == 0.6667 and f"survivor {survivor.file}:{survivor.line}" in words(summary)
    assert Results([(listed, Verdict("caught", "a test", 1.0))]).wrong()


def test_the_cache(everything, tmp_path, monkeypatch):
    caught, survived, same = everything[:3]
    path, files = tmp_path / "verdicts.jsonl", targets.files()
    cache = Cache(path, files)
    for mutant, kind in ((caught, "caught"), (survived, "survived"), (same, "equivalent")):
        cache.put(mutant, Verdict(kind, "", 1.0))
    path.write_text(path.read_text() + '{"key": "cut o')
    assert [Cache(path, files).get(m).kind for m in everything[:3]] == ["caught", "survived", "equivalent"]
    monkeypatch.setattr(
        "tests.emulation.mutate.cache.digest", lambda t, tests: "other" if tests else judge.digest(t, 0)
    )
    assert [Cache(path, files).get(m) is None for m in everything[:3]] == [True, True, False]
    assert [Cache(path, files, tests_grew=True).get(m) is None for m in everything[:3]] == [False, True, False]
    monkeypatch.setattr("tests.emulation.mutate.cache.digest", lambda t, tests: "other")
    assert [Cache(path, files).get(m) is None for m in everything[:3]] == [True] * 3


TOY = {
    "pyproject.toml": "[tool.pytest.ini_options]\n",
    "llmkern/__init__.py": "",
    "tests/__init__.py": "",
    "csrc/toy/cuda.cu": """
template <bool kThere>
struct Only;
template <>
struct Only<true> { static __device__ int f(int i) { return i; } };
__device__ bool toy_survivor(int i, int n) { return i < n; }
__device__ int toy_invalid(int i) { return Only<true>::f(i); }
__device__ int toy_equivalent(int i) { return i | i; }
__device__ float toy_caught(float x) { return x + x; }
extern "C" __global__ void twice(const float* x, float* out, int n) {
  int i = toy_equivalent(toy_invalid(threadIdx.x));
  if (toy_survivor(i, n)) out[i] = toy_caught(x[i]);
}
""",
    "tests/toy/__init__.py": "",
    "tests/toy/test_toy.py": """
import numpy as np
from tests.emulation import compilers, cuda_launches
from tests.emulation.ptx.launch import empty, run

def test_twice():
    x, out = np.arange(32, dtype=np.float32), empty((32,), np.float32)
    ptx = compilers.nvcc(compilers.ROOT / "csrc/toy/cuda.cu")
    run(ptx, "twice", 1, 32, [x, out, 32]).raise_if_faulty()
    assert (out.data == 2 * x).all()
""",
}


@pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
def test_a_run_from_end_to_end(tmp_path):
    """A small tree of its own: one mutant that the test misses, one it catches, one that changes nothing, one invalid.
    The second run knows their verdicts."""
    shutil.copytree(targets.ROOT / "tests/emulation", tmp_path / "tests/emulation")
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    table = tmp_path / "tests/emulation/mutate/targets.py"
    text = table.read_text()
    first, last = text.index("TARGETS = ("), text.index("def headers")
    toy = 'TARGETS = (Target("csrc/toy/cuda.cu", ptx=("tests/toy/test_toy.py",)),)\n\n\n'
    table.write_text(text[:first] + toy + text[last:])
    arguments = ["--kernel", "toy_", "--sample", "0", "--jobs", "1", "--json", "result.json"]
    for known in (0, 4):
        result = subprocess.run(
            [sys.executable, "-m", "tests.emulation.mutate", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert f"4 mutants, {known} verdicts known" in result.stdout, result.stdout + result.stderr
        assert result.returncode == 1  # half of the two that change behaviour
        summary = json.loads(Path(tmp_path / "result.json").read_text())
        assert (summary["planted"], summary["caught"], summary["equivalent"], summary["invalid"]) == (3, 1, 1, 1)
        (survivor,) = summary["survivors"]
        assert survivor["line"] == 6 and "i <= n" in survivor["after"] and "all pass" in survivor["reason"]


def test_the_mutator_imports_nothing_of_the_library():
    """A mutant's tests import it anew, and torch takes each operator once in a process."""
    code = "import sys, tests.emulation.mutate.__main__; print([m for m in sys.modules if m.startswith('llmkern')])"
    told = subprocess.run([sys.executable, "-c", code], cwd=targets.ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]", told.stdout
