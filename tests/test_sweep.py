"""The sweep over tiles: what it rejects, its model by hand, and one kernel compiled twice."""

from __future__ import annotations

import importlib.util

import pytest

from llmkern.attention.triton_configurations import TABLE
from llmkern.inspect import sweep
from llmkern.inspect.errors import InspectError
from llmkern.inspect.row import Row
from llmkern.int8.triton_configurations import TILES
from llmkern.triton_table import Line

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def line(rows, columns, warps=4, stages=2):
    return Line("int8", "one", "sm_90", 0, {"rows": rows, "columns": columns, "warps": warps, "stages": stages})


def compiled(x, target):
    rows = x.tile["rows"]
    if rows == 16:
        raise InspectError("linear_kernel does not compile:\n  out of registers")
    spill, shared = {256: (8, 1024), 32: (0, 300_000)}.get(rows, (0, 1024))
    occupancy = 4 / 64 if x.tile["stages"] == 1 else 0.5
    return Row("linear_kernel", "triton", "", target, 100, spill, shared, occupancy, {}, 0.4, 0.9)


def test_what_it_rejects_and_how_it_ranks():
    lines = [line(16, 64), line(256, 64), line(32, 64), line(64, 64), line(128, 128), line(128, 128, stages=1)]
    ranked = sweep.rank(lines, "sm_90", compiled)
    assert [r.line.tile["rows"] for r in ranked[:3]] == [128, 64, 128]
    # 128 * 128 products for 256 bytes, 32 bytes a cycle of 4096: half; the serial share is less.
    assert [r.modelled for r in ranked[:3]] == pytest.approx([0.4, 0.25, 0.2])
    told = {r.line.tile["rows"]: r.rejected for r in ranked[3:]}
    assert told[16] == "does not compile: out of registers" and told[256] == "spills 8 bytes"
    assert "no block fits: 300000 bytes" in told[32]
    text = sweep.table(ranked)
    assert "spills 8 bytes" in text and "40%" in text
    assert sweep.as_configured(ranked[0].line, "sm_90") == '"one": {"sm_90": Tile(128, 128, 4, 2)},'


def test_every_line_of_the_tables_can_be_asked_for():
    for family, kernels in sweep.KERNELS.items():
        for kernel in kernels:
            found = sweep.candidates(family, kernel, "sm_90", 128)
            assert found and len({str(x) for x in found}) == len(found), kernel
    assert set(sweep.INT8) == set(TILES) and set(sweep.ATTENTION) == set(TABLE)


@needs_triton
def test_a_call_takes_the_line_that_is_looked_at():
    for kernel, function in sweep.ATTENTION.items():
        tile = {"queries": 16, "keys": 16, "warps": 2, "stages": 5}
        made = sweep.launch(Line("attention", kernel, "sm_90", 64, tile))
        assert made.options["num_stages"] == 5 and made.kernel == function
    for kernel in sweep.INT8:
        other = Line("int8", kernel, "sm_90", 0, {"rows": 32, "columns": 32, "warps": 2, "stages": 5})
        assert sweep.launch(other).options["num_stages"] == 5, kernel


def test_the_traffic_of_integers():
    """128 queries: a key's byte and a value's two for 128 products at the rate of bytes and 128 at that of fp16."""
    tile = {"queries": 128, "keys": 64, "warps": 8, "stages": 2}
    traffic = sweep.traffic(Line("attention", "int8", "sm_90", 128, tile), "sm_90")
    assert traffic == pytest.approx(min(1.0, (128 / 2048 + 128 / 4096) / (3 / 32)))


@needs_triton
def test_two_candidates(capsys):
    assert sweep.main(["attention", "forward", "--target", "sm_80", "--width", "64", "--most", "2"]) == 0
    out = capsys.readouterr().out
    assert "compiled and modelled, not measured" in out and "_FORWARD_80 = ((64, _C(32, 32, 4, " in out
