"""In the kernels of attention on a cache: decode, and the append of keys and values."""

from __future__ import annotations

from tests.emulation.mutate.faults.fault import Planted

CACHE, DECODE = "csrc/attention/cuda_cache.cu", "csrc/attention/cuda_decode.cu"
TILE = "csrc/attention/cuda_decode_tile.cuh"

PLANTED = (
    # Append: which row goes where, what turns, how bytes are made.
    Planted(CACHE, "place >= 0 && place < p.capacity", "place < p.capacity"),
    Planted(CACHE, "exists = page >= 0 && page < p.pages.count;", "exists = page >= 0;"),
    Planted(CACHE, "row = place - number_of_page * p.pages.size;", "row = number_of_page;"),
    Planted(CACHE, "float* scales = is_key ? p.key_scales : p.value_scales;", "float* scales = p.key_scales;"),
    Planted(CACHE, "steps = is_key ? p.key_scale_steps : p.value_scale_steps;", "steps = p.key_scale_steps;"),
    Planted(CACHE, "if (scales) scales += page * steps[0] + head * steps[1] + row * steps[2];",
            "if (scales) scales += page * steps[0] + row * steps[1] + head * steps[2];"),
    Planted(CACHE, "(scales ? 1 : 2);", "2;"),
    Planted(CACHE, "+ (p.ordered ? i : 0);", "+ i;"),
    Planted(CACHE, "(place < 0 ? p.rotation.length : place) : -1", "place : -1"),
    Planted(CACHE, "first[1] = p.rotation.interleaved ? 2 * pair + kN : half + pair;", "first[1] = half + pair;"),
    Planted(CACHE, "float a = left, b = right;", "float& a = left;\n    float b = right;"),
    Planted(CACHE, "left = device::widen(device::narrow(fmaf(a, cos[i], -(b * sin[i])), T{}));",
            "left = fmaf(a, cos[i], -(b * sin[i]));"),
    Planted(CACHE, "float y = rintf(x[i] / scale);", "float y = truncf(x[i] / scale);"),
    Planted(CACHE, "y != y ? 0 : ", ""),
    Planted(CACHE, "scale = scale < kSmallest ? 1 :", "scale ="),
    Planted(CACHE, "uint32_t bits = device::float_to_bits(x[i]) & 0x7fffffffu;",
            "uint32_t bits = device::float_to_bits(x[i]);"),
    Planted(CACHE, "static_cast<const A*>(t.sin) + position * t.sin_step",
            "static_cast<const A*>(t.sin) + position * t.cos_step"),
    # Decode: barriers, the softmax in pieces, scales.
    Planted(DECODE, "query_aligned, queries);\n  __syncthreads();", "query_aligned, queries);"),
    Planted(DECODE, ") state.scale(alpha[0], alpha[1]);", ");"),
    Planted(DECODE, "key >= first && key < end)", "key >= first && key <= end)"),
    Planted(DECODE, "if (turn < kWarps - 1) outputs[32 * i + lane] = x;\n      }\n    }\n    __syncthreads();",
            "if (turn < kWarps - 1) outputs[32 * i + lane] = x;\n      }\n    }"),
    Planted(DECODE, "make_float2(state.max[r], state.sum[r]);\n  }\n  __syncthreads();",
            "make_float2(state.max[r], state.sum[r]);\n  }"),
    Planted(DECODE, "outputs[warp][lane + 32 * j] = output[j];\n    __syncthreads();",
            "outputs[warp][lane + 32 * j] = output[j];"),
    Planted(DECODE, "if (statistics[2 * s + 1] == 0) continue;", ""),
    Planted(DECODE, "if (x != minus_infinity()) x += log;", ""),
    Planted(DECODE, "if (seen) state.sum[r] += x * inverse[j], x *= sign[j];",
            "if (seen) state.sum[r] += x, x *= sign[j];"),
    Planted(DECODE, "bool shared = read_first >= all_first && read_end <= all_end;", "bool shared = true;"),
    Planted(DECODE, "if (first > 0) seen = first >= kTile ? 0 : seen >> first << first;", ""),
    Planted(DECODE, "kv_head * group + (begin + row) % group", "kv_head * group + (begin + row) / group"),
    Planted(DECODE, "place = find(p.pages, unit.b, key, tile < last && key >= first && key < end);",
            "place = find(p.pages, unit.b, key, tile < last && key < end);"),
    Planted(TILE, "page = page < 0 ? 0 : page >= pages.count ? pages.count - 1 : page;", "page = page < 0 ? 0 : page;"),
    Planted(TILE, "__byte_perm(biased, 0x64646464u, 0x4140)", "__byte_perm(biased, 0x64646464u, 0x4041)"),
    Planted(TILE, "(pairs[i] & 0x00800080u) | 0xc300c300u", "0xc300c300u"),
    Planted(TILE, "use(2 * w, __byte_perm(a, b, 0x5410)), use(2 * w + 1, __byte_perm(a, b, 0x7632));",
            "use(2 * w, __byte_perm(a, b, 0x7632)), use(2 * w + 1, __byte_perm(a, b, 0x5410));"),
    Planted(TILE, "return sum == 0;", "return true;"),
    Planted(TILE, "return 2 * (lane % 4) + (j & 1) + 8 * (j >> 1);", "return 4 * (lane % 4) + j;"),
)  # fmt: skip
