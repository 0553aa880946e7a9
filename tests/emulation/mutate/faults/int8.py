"""In the int8 kernels: digits, sums, tiles, and what is made of the sums."""

from __future__ import annotations

from tests.emulation.mutate.faults.fault import Planted

QUANTIZE, FEW, TILES = (f"csrc/int8/cuda_{name}.cu" for name in ("quantize", "few_rows", "tiles"))
FINISH, MMA = "csrc/int8/cuda_finish.cuh", "csrc/common/mma_int8.cuh"

PLANTED = (
    # The digits of the activations.
    Planted(QUANTIZE, "__fmul_rn(values[j], inverse)", "__fdiv_rn(values[j], s.scale)"),
    Planted(QUANTIZE, "int u = __float2int_rn(scaled) + s.zero;", "int u = __float2int_rz(scaled) + s.zero;"),
    Planted(QUANTIZE, "scale = __fdiv_rn(__fsub_rn(most, least), 255.0f);",
            "scale = (most - least) * (1.0f / 255.0f);"),
    Planted(QUANTIZE, "if (lane == 0) extents[warp] = e;\n    __syncthreads();", "if (lane == 0) extents[warp] = e;"),
    Planted(QUANTIZE, "if (digits == Digits::groups) {\n    __syncthreads();", "if (digits == Digits::groups) {"),
    Planted(QUANTIZE, "part.broken;\n    }\n    __syncthreads();", "part.broken;\n    }"),
    Planted(QUANTIZE, "p.digits.scale[m] = s.scale + e.broken;", "p.digits.scale[m] = s.scale;"),
    Planted(QUANTIZE, "row[place(k / N)] = piece;", "row[k / N] = piece;"),
    Planted(QUANTIZE, "if (any) device::store16(p.digits.high", "if (k < depth) device::store16(p.digits.high"),
    Planted(QUANTIZE, "first / kDigitsOfWord] = bits;", "first / kDigitsOfWord] |= bits;"),
    Planted(QUANTIZE, "reinterpret_cast<uintptr_t>(x) % 16 == 0;", "true;"),
    Planted(QUANTIZE, "rows, kThreads, static_cast<int>(shared)", "rows - 1, kThreads, static_cast<int>(shared)",
            host=True),
    Planted(QUANTIZE, "static_cast<size_t>(p.digits.groups) * sizeof(float) : 0", "0 : 0", host=True),
    # Few rows.
    Planted(FEW, "first : first + p.linear.outputs / 2;", "first : first + 2;"),
    Planted(FEW, "if (threadIdx.x >= kSums) return;", ""),
    Planted(FEW, "  __syncthreads();\n  if (threadIdx.x >= kSums)", "  if (threadIdx.x >= kSums)"),
    Planted(FEW, "device::dot16<false>(x, w[o], low[m][o])", "device::dot16<true>(x, w[o], low[m][o])"),
    Planted(FEW, "device::dot16<true>(y, w[o], high[m][o])", "device::dot16<false>(y, w[o], high[m][o])"),
    Planted(FEW, "(p.pairs && o >= 2)", "(p.pairs && o >= 3)"),
    Planted(FEW, "y, 2);  // of a pair", "y, 1);  // of a pair"),
    Planted(FEW, ": rows <= 4 ? few_rows_kernel<4, kDigits>", ": rows <= 5 ? few_rows_kernel<4, kDigits>", host=True),
    Planted(FEW, "(outputs + of_block - 1) / of_block", "outputs / of_block", host=True),
    # Tiles.
    Planted(TILES, "device::wait_for_copies<T::kStages - 2>();", "device::wait_for_copies<T::kStages - 1>();"),
    Planted(TILES, "    __syncthreads();  // the tile", "    // the tile"),
    Planted(TILES, "copy(tile + T::kStages - 1);", "copy(tile + T::kStages);"),
    Planted(TILES, "any_bits[i] = 0;\n    __syncthreads();", "any_bits[i] = 0;"),
    Planted(TILES, "&any_bits[i % words], bits);\n    __syncthreads();", "&any_bits[i % words], bits);"),
    Planted(TILES, "atomicOr(&any_bits[i % words], bits)", "any_bits[i % words] |= bits"),
    Planted(TILES, "w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]", "w[j / 2][j % 2 * 2 + 1], w[j / 2][j % 2 * 2]"),
    Planted(TILES, "lane / 16 * 8 + lane % 8, piece + lane / 8 % 2", "lane / 8 % 2 * 8 + lane % 8, piece + lane / 16"),
    Planted(TILES, "const bool together = l.out_stride % 2 == 0 &&", "const bool together ="),
    Planted(TILES, " && reinterpret_cast<uintptr_t>(l.out) % (2 * bytes) == 0;", ";"),
    Planted(TILES, "multiply<kGroups, kCount>(x, w, low);", "multiply<true, kCount>(x, w, low);"),
    Planted(TILES, "return c % kColumns < kColumns / 2 ? n : n + outputs / 2;", "return c < 64 ? n : n + outputs / 2;"),
    Planted(TILES, "          sum = 0;\n", ""),
    Planted(TILES, "(outputs + columns - 1) / columns", "outputs / columns", host=True),
    Planted(TILES, "p.pairs ? kTileColumns / 2 : kTileColumns;", "kTileColumns;", host=True),
    # From sums to results.
    Planted(FINISH, "__fadd_rn(__fmul_rn(sum, __fmul_rn(row_scale, c.scale)), c.bias)",
            "fmaf(sum, __fmul_rn(row_scale, c.scale), c.bias)"),
    Planted(FINISH, "__fmul_rn(sum, __fmul_rn(row_scale, c.scale))", "__fmul_rn(__fmul_rn(sum, row_scale), c.scale)"),
    Planted(FINISH, "low - zero * c.weight_sum", "low + zero * c.weight_sum"),
    Planted(FINISH, "return pairs ? __fmul_rn(y, second) : y;", "return y;"),
    Planted(MMA, "dp4a.u32.s32 %0, %1, %2, %3;", "dp4a.u32.s32 %0, %2, %1, %3;"),
    Planted(MMA, "dot4<kSigned>(a.z, b.z, sum);", "dot4<kSigned>(a.z, b.y, sum);"),
)  # fmt: skip
