"""Tables of measured tiles: how a line is chosen, what is written and read, and bad files."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import tiles
from llmkern import triton_table
from llmkern.triton_table import Line


def line(stages, **other):
    tile = {"queries": 64, "keys": 64, "warps": 4, "stages": stages}
    return Line(
        **{"family": "attention", "kernel": "forward", "architecture": "sm_90", "width": 64, "tile": tile} | other
    )


def times(table):
    """A timer that looks durations up by the stages; None is the packaged line."""

    def time(candidate):
        took = table[None if candidate is None else candidate.tile["stages"]]
        if took is None:
            raise RuntimeError("out of resource: shared memory")
        return took

    return time


@pytest.mark.parametrize(
    ("table", "stages"),
    [
        ({None: 1.0, 1: 0.9, 2: 0.5, 3: None}, 2),
        ({None: 1.0, 1: 0.99, 2: 0.98, 3: 2.0}, None),  # less than the gain that is worth a line
        ({None: 1.0, 1: None, 2: None, 3: None}, None),
    ],
)
def test_the_quickest_line_is_chosen(table, stages):
    told: list[str] = []
    problem = tiles.Problem("forward", [line(n) for n in (1, 2, 3)], times(table))
    found = tiles.choose(problem, 60.0, told.append)
    assert (found and found.tile["stages"]) == stages and told


def test_the_time_of_a_kernel_is_kept():
    now = iter(range(100))
    problem = tiles.Problem("forward", [line(n) for n in (1, 2, 3)], times({None: 1.0, 1: 0.5, 2: 0.5, 3: 0.5}))
    told: list[str] = []
    assert tiles.choose(problem, 1.5, told.append, lambda: next(now))
    assert any("the time is over after 1 of 3 candidates" in text for text in told)


def test_what_is_written_is_read(tmp_path, monkeypatch):
    from llmkern.attention.triton_configurations import Configuration, configuration
    from llmkern.int8.triton_configurations import Tile, tile

    of_int8 = {"rows": 64, "columns": 128, "warps": 8, "stages": 2}
    path = tmp_path / "table.json"
    lines = [line(4), Line("int8", "one", "sm_90", 0, of_int8)]
    triton_table.write(path, lines, machine="x")
    assert triton_table.read(path) == lines
    packaged, by_addresses = (configuration("forward", "sm_90", 2, 64, "", described) for described in (True, False))
    monkeypatch.setenv(triton_table.VARIABLE, str(path))
    monkeypatch.setattr(triton_table, "_lines", None)
    assert configuration("forward", "sm_90", 2, 64, "", True) == Configuration(64, 64, 4, 4) != packaged
    # It was not measured without descriptors, nor with sequences end to end.
    assert configuration("forward", "sm_90", 2, 64, "", False) == by_addresses
    assert configuration("forward", "sm_90", 2, 64, "", True, own=False) == packaged
    assert (
        configuration("forward", "sm_90", 4, 64, "").stages
        == configuration("forward", "sm_90", 2, 64, "more").stages
        == 1
    )
    assert configuration("forward", "sm_80", 2, 64, "") == configuration("forward", "sm_80", 2, 64, "")
    assert configuration("forward", "sm_90", 2, 128, "").queries == 128
    assert tile("sm_90", 256, 0, False, False) == Tile(64, 128, 8, 2) != tile("sm_80", 256, 0, False, False)


GOOD = {
    "family": "attention", "kernel": "forward", "architecture": "sm_90", "width": 64,
    "tile": {"queries": 64, "keys": 64, "warps": 4, "stages": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", 'expected {"version": 1, "lines": [...]}'),
        ({"version": 2, "lines": []}, 'expected {"version": 1'),
        ([{**GOOD, "family": "loss"}], "lines[0]: family: expected one of attention, int8, got 'loss'"),
        ([GOOD, {**GOOD, "kernel": "x"}], "lines[1]: kernel: expected one of forward, queries, keys, int8, got 'x'"),
        ([{**GOOD, "architecture": 90}], 'architecture: expected "sm_90"'),
        ([{**GOOD, "width": "64"}], "width: expected an integer of at least 0, got '64'"),
        ([{**GOOD, "more": 1}], "expected the keys architecture, family, kernel, tile, width"),
        ([{**GOOD, "tile": {"queries": 64}}], "tile: expected the keys keys, queries, stages, warps"),
        ([{**GOOD, "tile": {**GOOD["tile"], "keys": 48}}], "keys: expected a power of two from 16 to 256, got 48"),
        ([{**GOOD, "tile": {**GOOD["tile"], "warps": 32}}], "warps: expected a power of two from 1 to 16, got 32"),
        ([{**GOOD, "tile": {**GOOD["tile"], "stages": 9}}], "stages: expected at most 8, got 9"),
        ([{**GOOD, "tile": {**GOOD["tile"], "stages": True}}], "stages: expected a positive integer, got True"),
        ([GOOD, GOOD], "expected one line for each family, kernel, architecture and width"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_table_is_refused(content, words, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    if content is not None:
        lines = {"version": 1, "lines": content} if isinstance(content, list) else content
        path.write_text(content if isinstance(content, str) else json.dumps(lines))
    monkeypatch.setenv(triton_table.VARIABLE, str(path))
    monkeypatch.setattr(triton_table, "_lines", None)
    with pytest.raises(ValueError, match="LLMKERN_TRITON_TABLE") as raised:
        triton_table.own("attention", "forward", "sm_90", 64)
    assert words in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize("family", ["sm_86", "sm_90", "gfx942"])
def test_what_cannot_be_made_fails_its_kernel_alone(family, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tiles.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles.machine, "describe", dict)
    monkeypatch.setattr(tiles.triton, "family", lambda device: family)

    def calls(setting, of, kernel, width):
        if width == 64:
            raise MemoryError("out of memory")
        return None, None

    monkeypatch.setattr(tiles, "_calls", calls)
    monkeypatch.setattr(tiles, "on_device", lambda line, call, small: 1.0 if line is None else 0.5)
    out = tmp_path / "table.json"
    assert tiles.main([str(out), "--family", "attention", "--kernel", "forward", "--seconds", "0.2"]) == 0
    assert "attention forward 64: MemoryError: out of memory" in capsys.readouterr().err
    assert {found.width for found in triton_table.read(out)} == {*tiles.sweep.WIDTHS} - {64}
