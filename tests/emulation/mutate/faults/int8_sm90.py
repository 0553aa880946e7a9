"""In the int8 products for Hopper: waits, meetings, high digits, groups, pairs."""

from __future__ import annotations

from tests.emulation.mutate.faults.fault import Planted

PRODUCE = "csrc/int8/sm90_produce.cuh"
TILE = "csrc/int8/sm90_tile.cuh"
TILES = "csrc/int8/cuda_sm90.cu"

PLANTED = (
    Planted(TILES, "{ barrier_wait(shared.control().full[ring.stage], ring.parity); }", "{}"),
    Planted(
        PRODUCE,
        "    barrier_wait(control.empty[ring.stage], ring.parity ^ 1);\n    barrier_expect",
        "    barrier_expect",
    ),
    Planted(PRODUCE, "barrier_expect(full, T::kHigh);", "barrier_expect(full, T::kHigh + 16);"),
    Planted(TILES, "wgmma_wait<1>();\n      release(before);", "release(before);"),
    Planted(
        TILES,
        "    wgmma_wait<0>();\n    wgmma_sums(low);\n    wgmma_sums(high);",
        "    wgmma_sums(low);\n    wgmma_sums(high);",
    ),
    Planted(TILES, "named_sync(kBoth, kConsumers * kWarpgroup);", ""),
    Planted(TILES, "    __syncwarp();\n    finish_rows", "    finish_rows"),
    Planted(
        TILES, "    registers_give<kProducerRegisters>();", "    if (warp == 0) registers_give<kProducerRegisters>();"
    ),
    Planted(
        TILES,
        "    registers_take<kConsumerRegisters>();",
        "    if (threadIdx.x % 32 == 0) registers_take<kConsumerRegisters>();",
    ),
    Planted(TILE, "p.pairs ? first + outputs / 2", "p.pairs ? first"),
    Planted(
        PRODUCE,
        "      async_fence();\n      arrive_with_warp(control.full[behind]);",
        "      arrive_with_warp(control.full[behind]);",
    ),
    Planted(TILES, "(any | any >> 1) & 0x55", "any & 0x55"),
    Planted(TILES, "control.any_bits[i] = 0;", "(void)i;"),
    Planted(TILE, "(end >= depth || end % ", "(end % "),
    Planted(TILES, "adds || k > unit * T::kUnit", "true"),
)
