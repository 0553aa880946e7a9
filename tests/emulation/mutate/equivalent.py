"""Mutants whose PTX differs and whose behaviour does not, each with the reason; an entry that fits none is an error."""

from __future__ import annotations

import dataclasses

from tests.emulation.mutate.mutant import Mutant


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """The mutants of a file and function whose changed lines, with single spaces, are `before` and `after`."""

    file: str
    function: str
    before: str
    after: str
    reason: str

    def fits(self, mutant: Mutant) -> bool:
        there = (mutant.file, mutant.function, mutant.before, mutant.after)
        return there == (self.file, self.function, self.before, self.after)


TRITON = "llmkern/positional/triton_kernels.py"
LOADS = {n: f"{n[0]} = tl.load({n[2:]} + position * {n[2:]}_s + pair, mask=known" for n in ("c_cos", "d_sin")}
QUANTIZE = "csrc/int8/cuda_quantize.cu"
DECODE_TILE = "csrc/attention/cuda_decode_tile.cuh"
FORWARD, CACHE, DECODE, SM90 = (f"csrc/attention/cuda_{name}.cu" for name in ("forward", "cache", "decode", "sm90"))
EQUIVALENT = (
    *(
        Equivalent(
            TRITON,
            "rotary_kernel",
            f'{load}, other=float("nan")).to(tl.float32)',
            f"{load}, other=float(0)).to(tl.float32)",
            "outside of the table the other of the two is still NaN, and both results contain it",
        )
        for load in LOADS.values()
    ),
    Equivalent(
        QUANTIZE,
        "quantize_kernel",
        "if (lane == 0) group_scales[g] = choose(l.quantize, part, 0.0f).scale + part.broken;",
        "if (lane == 0) group_scales[g] = choose(l.quantize, part, 1.0f).scale + part.broken;",
        "the mean has no part in the scales of groups, whose inputs are symmetric: cuda.py refuses others",
    ),
    Equivalent(
        FORWARD,
        "repair_row",
        "for (int j = 0; j < kWidth / 32; j++)",
        "for (int j = 0; j <= kWidth / 32; j++)",
        "a value is not wider than kWidth: no lane does anything in the round too many",
    ),
    Equivalent(
        CACHE,
        "",
        "is_key && p.rotation.cos ? (place < 0 ? p.rotation.length : place) : -1,",
        "is_key && p.rotation.cos ? place : -1,",
        "a key in front of the cache is written nowhere, turned or not",
    ),
    Equivalent(
        DECODE,
        "join_warps",
        "if (lane % 4 == 0) sums[warp][lane / 4 + 8 * r] = make_float2(state.max[r], state.sum[r]);",
        "if (!(lane % 4 == 0)) sums[warp][lane / 4 + 8 * r] = make_float2(state.max[r], state.sum[r]);",
        "the four lanes of a row have the same largest score and, from the shuffles before, the same sum",
    ),
    Equivalent(
        SM90,
        "finish",
        "if (thread == 0 && first < w.queries) {",
        "if (thread == 0 && first <= w.queries) {",
        "a copy that begins behind the last row lies outside of the tensor map, and writes nothing",
    ),
    Equivalent(
        SM90,
        "run",
        "wgmma_wait<1>(scores);",
        "wgmma_wait<0>(scores);",
        "it waits for the product with the values too, which comes to the same sums, later",
    ),
    Equivalent(
        DECODE,
        "decode_kernel",
        "Place place = {0, -1};",
        "Place place = {0, 1};",
        "read_keys sets it before anything reads it",
    ),
    Equivalent(
        DECODE,
        "",
        "place = find(p.pages, unit.b, key, tile < last && key >= first && key < end);",
        "place = find(p.pages, unit.b, key, tile < last && key < end);",
        "keys in front of the window are read too, with a weight of 0; what is not finite is left out as elsewhere",
    ),
    Equivalent(
        DECODE_TILE,
        "add_some",
        "for (int j = 0; j < 4; j++) y[j] = keys >> key(j, lane) & 1 ? word(x[j][c], i / 2) : 0;",
        "for (int j = 0; j < 4; j++) y[j] = keys >> key(j, lane) & 1 ? word(x[j][c], i / 2) : 1;",
        "the weights of these keys are 0, and the elements of a word that is 1 are finite",
    ),
)


def reason(mutant: Mutant) -> str | None:
    return next((e.reason for e in EQUIVALENT if e.fits(mutant)), None)


def stale(mutants: list[Mutant]) -> list[Equivalent]:
    """Entries that fit none of all mutants of their files."""
    files = {m.file for m in mutants}
    return [e for e in EQUIVALENT if e.file in files and not any(map(e.fits, mutants))]
