"""The README: its example runs, and its table names every environment variable that the code reads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import torch

from tests.training.pages import block, torchrun

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_drop_in_runs_as_printed(capsys):
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    exec(compile(example, "README.md", "exec"), {})
    assert "PASSED" in capsys.readouterr().out


def test_the_training_example_runs_as_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    example = block("README.md", "python", "Trainer(")
    for steps in (30, 0):  # begun again, it goes on from its last checkpoint, where nothing is left to do
        exec(compile(example, "README.md", "exec"), {})
        losses = [float(word) for word in capsys.readouterr().out.strip(" []\n").split(",") if word]
        assert len(losses) == steps and sum(losses[-5:]) <= 0.75 * sum(losses[:5])


def test_the_training_example_runs_under_torchrun_each_process_on_data_of_its_own(tmp_path):
    shutil.copy(ROOT / "README.md", tmp_path)
    printed = torchrun(block("README.md", "python", "Trainer("), tmp_path)
    assert len(printed.splitlines()) == 2 and printed.count(",") == 2 * 29
    for rank in range(2):
        kept = torch.load(tmp_path / f"output/readme/step-30/rank-{rank}.pt", weights_only=False)
        assert kept["data"]["own"] == {"position": 30, "seed": 0, "together": 16, "examples": 64}


def test_every_environment_variable_stands_in_the_table():
    patterns = [r'environ(?:\.get\(|\[)"(LLMKERN_\w+)"', r'"(LLMKERN_\w+)" in os\.environ', r'getenv\("(LLMKERN_\w+)"']
    sources = [ROOT / "setup.py", *(ROOT / "llmkern").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"),
               ROOT / "tests/conftest.py"]  # fmt: skip
    used = {name for path in sources for pattern in patterns for name in re.findall(pattern, path.read_text())}
    assert len(used) > 5
    missing = {name for name in used if f"| `{name}` |" not in README}
    assert not missing, missing


def test_its_two_commands_are_targets_of_the_makefile_and_ci_calls_the_second():
    commands = re.findall(r"^(make \w+) +#", README, re.MULTILINE)
    assert commands == ["make demo", "make test"]
    for command in commands:
        subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, check=True, capture_output=True)
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_lines_of_prose_fit():
    sections = re.findall(r"^## (?:What is supported where|Limits)\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)
    assert len(sections) == 2
    assert not [line for section in sections for line in section.splitlines() if len(line) > 120 and line[0] != "|"]
