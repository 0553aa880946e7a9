"""In the attention forward by mma.sync: copies, fragments, the online softmax, masks, and rows done again."""

from __future__ import annotations

from tests.emulation.mutate.faults.fault import Planted

FORWARD, SCORES = "csrc/attention/cuda_forward.cu", "csrc/attention/cuda_scores.cuh"
LIMITS, MMA, PHILOX = "csrc/attention/key_limits.h", "csrc/common/mma.cuh", "csrc/common/philox.cuh"

PLANTED = (
    # Copies and barriers.
    Planted(FORWARD, "      wait_for_copies<0>();\n      __syncthreads();\n      if (key + kKeys",
            "      __syncthreads();\n      if (key + kKeys"),
    Planted(FORWARD, "      wait_for_copies<0>();\n      __syncthreads();\n      if (key + kKeys",
            "      wait_for_copies<0>();\n      if (key + kKeys"),
    Planted(FORWARD, "      wait_for_copies<0>();\n      __syncthreads();\n      load<kKeys>(v",
            "      wait_for_copies<0>();\n      load<kKeys>(v"),
    Planted(FORWARD, "      wait_for_copies<0>();\n      __syncthreads();\n      load<kKeys>(v",
            "      __syncthreads();\n      load<kKeys>(v"),
    Planted(FORWARD, "    wait_for_copies<0>();  // the queries, where no key was seen\n    __syncthreads();\n",
            "    __syncthreads();\n"),
    Planted(FORWARD, "    __syncwarp();\n    T* to", "    T* to"),
    Planted(FORWARD, "      __syncwarp();\n      repair(broken);", "      repair(broken);"),
    Planted(FORWARD, "there ? source + i * kRowsAtOnce * step : from, there ? 16 : 0", "source, 16"),
    # Fragments.
    Planted(FORWARD, "swizzle<kRowBytes>(lane / 16 * 8 + lane % 8, lane / 8 % 2)",
            "swizzle<kRowBytes>(lane / 8 % 2 * 8 + lane % 8, lane / 16)"),
    Planted(FORWARD, "multiply(s[t][2 * n], q, key[0], key[1], T{});",
            "multiply(s[t][2 * n], q, key[0], key[2], T{});"),
    Planted(FORWARD, "weight[t][i] = narrow_pair(pair[0], pair[1], T{});",
            "weight[t][i] = narrow_pair(pair[1], pair[0], T{});"),
    Planted(FORWARD, "load_matrices_transposed(value,", "load_matrices(value,"),
    Planted(FORWARD, "const uint32_t* q = kQueriesStay ? query[t][kQueriesStay ? step : 0] : again[t];",
            "const uint32_t* q = kQueriesStay ? query[t][0] : again[t];"),
    # The online softmax.
    Planted(FORWARD, "sum[t][half] = fmaf(sum[t][half], kept, added);", "sum[t][half] += added;"),
    Planted(FORWARD, "most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));", ""),
    Planted(FORWARD, "output[t][d][2 * half] *= kept, output[t][d][2 * half + 1] *= kept;",
            "output[t][d][2 * half] *= kept;"),
    Planted(FORWARD, "return most == minus_infinity() ? 0 : most * w.factor;", "return most * w.factor;"),
    Planted(FORWARD, "static_cast<double>(log2_quick(with_sink))) * double{kLn2}",
            "static_cast<double>(log2_quick(total))) * double{kLn2}"),
    Planted(FORWARD, "if (empty) logsumexp = static_cast<double>(minus_infinity());", ""),
    Planted(FORWARD, "(p.drop_below ? p.keep_scale : 1) / with_sink", "1 / with_sink"),
    # Heads, rows, masks.
    Planted(FORWARD, "kv_head = static_cast<uint32_t>(h) / (heads / static_cast<uint32_t>(p.kv_heads));",
            "kv_head = static_cast<uint32_t>(h) % static_cast<uint32_t>(p.kv_heads);"),
    Planted(FORWARD, "w.value_aligned);", "w.key_aligned);"),
    Planted(FORWARD, "if (seen == Seen::some) limit_scores", "if (seen == Seen::none) limit_scores"),
    Planted(FORWARD, "p.uniform_empty_rows || p.sink ||", "p.uniform_empty_rows ||"),
    Planted(FORWARD, "if (row < rules.queries) repair_row(row, shift, by);", "repair_row(row, shift, by);"),
    Planted(SCORES, "added == minus_infinity() ? added : s[n][first + e] + added", "s[n][first + e] + added"),
    Planted(SCORES, "if (from <= 8 * n + e && 8 * n + e < to) {", "{"),
    Planted(SCORES, "int odd = static_cast<int>(threadIdx.x % 2);", "int odd = 0;"),
    Planted(SCORES, "static_cast<uint32_t>(b * p.heads + h)", "static_cast<uint32_t>(h)"),
    Planted(LIMITS, "m.bottom_right ? keys - queries : 0", "0"),
    Planted(LIMITS, "return key_start(l, last) <= begin && end <= key_limit(l, first)",
            "return key_start(l, first) <= begin && end <= key_limit(l, last)"),
    Planted(LIMITS, "row + l.diagonal + l.right + 1", "row + l.diagonal + l.right"),
    Planted(MMA, "(piece ^ (row & 7)) << 4", "piece << 4"),
    Planted(MMA, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}",
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %7}"),
    Planted(PHILOX, "c0 = high1 ^ c1 ^ k0, c1 = low1", "c1 = low1, c0 = high1 ^ c1 ^ k0"),
    # The launcher: which kernel, how much work, what is aligned.
    Planted(FORWARD, "p.width <= 64 && p.value_width <= 64 ? 64 : 128", "p.width <= 64 ? 64 : 128", host=True),
    Planted(FORWARD, "p.alibi || p.drop_below || !(p.scale > 0);", "p.alibi || !(p.scale > 0);", host=True),
    Planted(FORWARD, "p.drop_below || !(p.scale > 0);", "p.drop_below;", host=True),
    Planted(FORWARD, "l.blocks = p.batch * p.heads * ((p.queries + rows - 1) / rows);",
            "l.blocks = p.batch * p.heads * (p.queries / rows);", host=True),
    Planted(FORWARD, "aligned(p.value, p.value_width),", "aligned(p.key, p.width),", host=True),
    Planted(FORWARD, "aligned(p.output, p.value_width)}", "true}", host=True),
)  # fmt: skip
