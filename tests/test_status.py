"""The status page names what was built and what serves every operator, also where the library is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from llmkern import backend, extension


def status(**env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "llmkern"], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_operator_is_listed_with_what_serves_it():
    page = status()
    assert extension._C.active_isa() in page and "CUDA kernels" in page and "Triton" in page
    from llmkern.backend import Operator

    for name, operator in Operator.all.items():
        assert operator.example is not None, f"{name} has no example for the status page"
        line = next(line for line in page.splitlines() if line.startswith(f"{name} ") and " float32 " in line)
        first = operator.by_device["cpu"][0].name  # "reference" where there is no kernel for the CPU
        assert line.split()[1:4] == ["cpu", "float32", first], line


def test_the_choice_between_cuda_and_triton_is_shown():
    page = status()
    line = next(line for line in page.splitlines() if "8.0 and newer" in line and line.startswith("rotary "))
    assert backend.PREFERENCES[0].reason in line


def test_what_int8_gains_here_is_shown():
    page = status()
    lines = [line for line in page.splitlines() if "times as fast in int8" in line]
    assert len(lines) == 6 and all(re.search(r"\d at 768x768", line) for line in lines)
    assert "us a call" in page and "multiply-adds/s" in page


def test_a_missing_library_is_said_with_the_way_to_get_it():
    page = status(LLMKERN_LIBRARY="/nowhere/_C.so")
    assert "missing" in page and "pip install -e ." in page
    assert "reference" in page.splitlines()[-1]


def test_a_forced_instruction_set_is_shown():
    assert "portable serves (forced by LLMKERN_ISA)" in status(LLMKERN_ISA="portable")


def test_a_forced_backend_is_what_the_table_shows():
    page = status(LLMKERN_BACKEND="triton")
    rows = [line.split() for line in page.splitlines() if re.match(r"\w+ +(cpu|cuda) +", line)]
    assert rows and not {row[3] for row in rows} & {"cpu", "cuda", "reference"}
    assert "there is no such kernel of this operator" in page


@pytest.mark.parametrize(
    ("variable", "choices"), [("LLMKERN_ISA", extension._C.supported_isas()), ("LLMKERN_BACKEND", backend.NAMES)]
)
def test_a_wrong_setting_is_one_sentence(variable, choices):
    run = subprocess.run(
        [sys.executable, "-m", "llmkern"], env={**os.environ, variable: "foo"}, capture_output=True, text=True
    )
    assert run.returncode == 1 and not run.stdout
    assert run.stderr == f"{variable}: expected one of {', '.join(choices)}, got 'foo'\n"
