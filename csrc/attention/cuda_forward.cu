// The forward of attention for CUDA by mma.sync, for sm_80 and newer: FlashAttention-2 (Dao 2023, algorithm 1 and
// section 3.3).
//
// A block of four warps takes 64 or 128 queries of one head, a warp 16 or 32 of them, and meets the keys 32 or 64 at a
// time with the online softmax (Milakov and Gimelshein 2018). Keys and values have one buffer each: while scores are
// made, the values come, and while the values are summed, the next keys. Scores and weights never leave the registers.
//
// A masked value has no part, be it infinite or NaN, though its weight of 0 makes NaN of it in a product. So a row
// whose result is not finite is done again by its warp, one key at a time, leaving out what has weight 0.
#include "../common/launch.cuh"
#include "cuda.h"
#include "cuda_scores.cuh"

namespace llmkern {
namespace {

using namespace device;

constexpr int kWarps = 4, kBlockThreads = 32 * kWarps;

// x, of which the compiler does not know that it is the same in each turn of a loop: what follows from it is worked out
// again where it is needed, and takes no registers beside the sums. The few limits of masks are cheap, spills are not.
LLMKERN_DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// How many keys a tile has: fewer where the sums of 32 rows of 128 leave no room for the scores of more.
constexpr int keys_of_tile(int width, int row_tiles) { return width * row_tiles > 128 ? 32 : 64; }
constexpr int rows_of_block(int row_tiles) { return 16 * row_tiles * kWarps; }
// Bytes of a block's queries, keys and values.
constexpr int shared_of(int width, int row_tiles) {
  return 2 * width * (rows_of_block(row_tiles) + 2 * keys_of_tile(width, row_tiles));
}

// How a kernel is to be launched, and which of those in its file it is.
struct HowToLaunch {
  int width;      // that shared memory has room for: 64 or 128
  int row_tiles;  // of 16 queries, a warp's
  bool features;  // rules beyond limits, dropout, a scale that is not positive
  int64_t blocks;
  int threads, shared_bytes;
};
// What the blocks of the forward are told besides.
struct Work {
  uint32_t row_blocks;  // of each head
  float factor;         // e^(scale * score - m) is 2^(factor * score - ...)
  uint64_t seed;        // of the dropout, by value: a copy to the device could not be part of a CUDA graph
  // Whether pieces of 8 elements lie at multiples of 16 bytes.
  bool query_aligned, key_aligned, value_aligned, output_aligned;
};

// One block's work. Query and key are numbered in 32 bits (kMostRows).
template <class T, int kWidth, int kTiles, bool kFeatures>
struct Forward {
  static constexpr int kKeys = keys_of_tile(kWidth, kTiles), kNumbers = kKeys / 8;
  static constexpr int kRows = rows_of_block(kTiles), kRowBytes = 2 * kWidth, kPieces = kWidth / 8;
  static constexpr int kQueryBytes = kRows * kRowBytes, kTileBytes = kKeys * kRowBytes;
  static constexpr int kShared = shared_of(kWidth, kTiles);
  // Where they would not leave room for the rest, queries are read from shared memory again for each tile.
  static constexpr bool kQueriesStay = kTiles * kWidth <= 128;

  const AttentionParams& p;
  const Work& w;
  int lane, warp;
  int b, h, first_row, row;  // the block's first query; the first of this thread's
  HeadRules rules;
  uint32_t queries, keys, values;  // in shared memory
  const T *key_data, *value_data;
  float output[kTiles][kPieces][4], largest[kTiles][2], sum[kTiles][2];
  uint32_t query[kTiles][kQueriesStay ? kWidth / 16 : 1][4];

  LLMKERN_DEVICE Forward(const AttentionParams& p, const Work& w, unsigned char* shared) : p(p), w(w) {
    lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    // The last queries first: with a causal mask they take longest.
    uint32_t head = blockIdx.x / w.row_blocks, heads = static_cast<uint32_t>(p.heads);
    first_row = static_cast<int>(w.row_blocks - 1 - (blockIdx.x - head * w.row_blocks)) * kRows;
    b = static_cast<int>(head / heads), h = static_cast<int>(head - static_cast<uint32_t>(b) * heads);
    row = first_row + warp * 16 * kTiles + lane / 4;
    rules = head_rules(p, w.seed, b, h);
    queries = shared_address(shared), keys = queries + kQueryBytes, values = keys + kTileBytes;
    uint32_t kv_head = static_cast<uint32_t>(h) / (heads / static_cast<uint32_t>(p.kv_heads));
    key_data = start(p.key, kv_head), value_data = start(p.value, kv_head);
  }

  LLMKERN_DEVICE const T* start(const AttentionTensor& t, int64_t head) const {
    return reinterpret_cast<const T*>(t.data) + b * t.b + head * t.h;
  }
  LLMKERN_DEVICE int row_of(int t, int half) const { return row + 16 * t + 8 * half; }

  // Rows [first, first + kCount) of a matrix of `rows` rows into shared memory, with zeros where there is nothing.
  template <int kCount>
  LLMKERN_DEVICE void load(uint32_t to, const T* from, int64_t step, int first, int rows, int width,
                           bool aligned) const {
    constexpr int kRowsAtOnce = kBlockThreads / kPieces;
    static_assert(kRowsAtOnce % 8 == 0, "the swizzle of a thread's rows is the same");
    int r = static_cast<int>(threadIdx.x) / kPieces, c = static_cast<int>(threadIdx.x) % kPieces;
    uint32_t at = to + swizzle<kRowBytes>(r, c);
    const T* source = from + (first + r) * step + 8 * c;
    int left = 8 * c < width ? rows - first - r : 0;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kCount / kRowsAtOnce; i++) {
        bool there = i * kRowsAtOnce < left;
        copy16_async(at + i * kRowsAtOnce * kRowBytes, there ? source + i * kRowsAtOnce * step : from, there ? 16 : 0);
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kCount / kRowsAtOnce; i++, source += kRowsAtOnce * step) {
      uint32_t words[4] = {};
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (i * kRowsAtOnce < left && 8 * c + j < width)
          words[j / 2] |= static_cast<uint32_t>(source[j].bits) << 16 * (j % 2);
      store_shared16(at + i * kRowsAtOnce * kRowBytes, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
  LLMKERN_DEVICE void load_keys(int key) const {
    load<kKeys>(keys, key_data, p.key.row, key, rules.limits.keys, static_cast<int>(p.width), w.key_aligned);
  }

  LLMKERN_DEVICE void read_query(uint32_t* x, int t, int step) const {
    uint32_t at = queries + swizzle<kRowBytes>((warp * kTiles + t) * 16 + lane % 16, lane / 16);
    load_matrices(x, at ^ static_cast<uint32_t>(step << 5));
  }

  LLMKERN_DEVICE void make_scores(float (*s)[kNumbers][4]) const {
    uint32_t at = keys + swizzle<kRowBytes>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < kWidth / 16; step++) {
      uint32_t again[kTiles][4];
      if constexpr (!kQueriesStay)
#pragma unroll
        for (int t = 0; t < kTiles; t++) read_query(again[t], t, step);
#pragma unroll
      for (int n = 0; n < kKeys / 16; n++) {
        uint32_t key[4];
        load_matrices(key, (at ^ static_cast<uint32_t>(step << 5)) + n * 16 * kRowBytes);
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
          const uint32_t* q = kQueriesStay ? query[t][kQueriesStay ? step : 0] : again[t];
          multiply(s[t][2 * n], q, key[0], key[1], T{});
          multiply(s[t][2 * n + 1], q, key[2], key[3], T{});
        }
      }
    }
  }

  // What 2^(factor * score - shift) is relative to. Nothing seen: any finite value, so that 2^(-infinity - it) is 0.
  LLMKERN_DEVICE float shift_of(float most) const { return most == minus_infinity() ? 0 : most * w.factor; }

  // From scores to weights relative to the largest so far; what was summed before is made relative to the new one.
  LLMKERN_DEVICE void soften(float (*s)[4], int t) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float before = largest[t][half], most = before;
#pragma unroll
      for (int n = 0; n < kNumbers; n++) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      largest[t][half] = most;
      float shift = shift_of(most), kept = exp2_quick(fmaf(before, w.factor, -shift)), added = 0;
#pragma unroll
      for (int n = 0; n < kNumbers; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          s[n][e] = exp2_quick(fmaf(s[n][e], w.factor, -shift));
          added += s[n][e];
        }
      sum[t][half] = fmaf(sum[t][half], kept, added);
#pragma unroll
      for (int d = 0; d < kPieces; d++) output[t][d][2 * half] *= kept, output[t][d][2 * half + 1] *= kept;
    }
  }

  LLMKERN_DEVICE void add_values(const float (*s)[kNumbers][4]) {
    uint32_t at = values + swizzle<kRowBytes>(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < kKeys / 16; step++) {
      uint32_t weight[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* pair = s[t][2 * step + i / 2] + i % 2 * 2;
          weight[t][i] = narrow_pair(pair[0], pair[1], T{});
        }
#pragma unroll
      for (int d = 0; d < kWidth / 16; d++) {
        uint32_t value[4];
        load_matrices_transposed(value, (at ^ static_cast<uint32_t>(d << 5)) + step * 16 * kRowBytes);
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
          multiply(output[t][2 * d], weight[t], value[0], value[1], T{});
          multiply(output[t][2 * d + 1], weight[t], value[2], value[3], T{});
        }
      }
    }
  }

  // All tiles of keys that some query of the block sees.
  LLMKERN_DEVICE void attend() {
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        largest[t][half] = minus_infinity(), sum[t][half] = 0;
#pragma unroll
        for (int d = 0; d < kPieces; d++) output[t][d][2 * half] = output[t][d][2 * half + 1] = 0;
      }
    int key = key_start(rules.limits, first_row) / kKeys * kKeys;
    int end = key_limit(rules.limits, first_row + kRows - 1);
    load<kRows>(queries, start(p.query, h), p.query.row, first_row, rules.queries, static_cast<int>(p.width),
                w.query_aligned);
    if (key < end) load_keys(key);
    commit_copies();
    int warp_row = first_row + warp * 16 * kTiles;
    for (bool first = true; key < end; key += kKeys, first = false) {
      int row = kWidth > 64 ? anew(warp_row) : warp_row;
      Seen seen = look_at_block(rules.limits, row, row + 16 * kTiles - 1, key, key + kKeys);
      wait_for_copies<0>();
      __syncthreads();
      load<kKeys>(values, value_data, p.value.row, key, rules.limits.keys, static_cast<int>(p.value_width),
                  w.value_aligned);
      commit_copies();
      if constexpr (kQueriesStay)
        if (first)
#pragma unroll
          for (int t = 0; t < kTiles; t++)
#pragma unroll
            for (int step = 0; step < kWidth / 16; step++) read_query(query[t][step], t, step);
      float s[kTiles][kNumbers][4] = {};
      if (seen != Seen::none) make_scores(s);
      wait_for_copies<0>();
      __syncthreads();
      if (key + kKeys < end) load_keys(key + kKeys);
      commit_copies();
      if (seen == Seen::none) continue;
      int mine = key + lane % 4 * 2;
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if constexpr (kFeatures) bend_scores<T, kNumbers>(p, rules, s[t], 2 * half, b, h, row_of(t, half), mine);
          if (seen == Seen::some) limit_scores<kNumbers>(rules.limits, s[t], 2 * half, anew(row_of(t, half)), mine);
        }
        soften(s[t], t);
        if constexpr (kFeatures)
          if (p.drop_below) drop_weights<kNumbers>(p, rules, s[t], row_of(t, 0), mine);
      }
      add_values(s);
    }
    wait_for_copies<0>();  // the queries, where no key was seen
    __syncthreads();
  }

  // Divides the sums by those of the weights, whose inverses stay in `sum`, and writes the log-sum-exps. Bit 2 t +
  // half: the results of a row are not all finite.
  LLMKERN_DEVICE uint32_t finish(const float* average) {
    uint32_t broken = 0;
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float total = sum[t][half], most = largest[t][half] * w.factor;
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        bool empty = total == 0 && most == minus_infinity();
        float with_sink = p.sink ? total + exp2_quick(fmaf(p.sink[h], kLog2e, -most)) : total;
        double logsumexp = (static_cast<double>(most) + static_cast<double>(log2_quick(with_sink))) * double{kLn2};
        if (empty) logsumexp = static_cast<double>(minus_infinity());
        // So much above the scores that nothing is left of them: it is the sum.
        if (p.sink && (empty || with_sink == -minus_infinity())) logsumexp = static_cast<double>(p.sink[h]);
        int row = row_of(t, half);
        if (lane % 4 == 0 && row < rules.queries && p.logsumexp)
          p.logsumexp[(b * p.heads + h) * p.queries + row] = logsumexp;
        float by = empty ? 1 : (p.drop_below ? p.keep_scale : 1) / with_sink, finite = 0;
        sum[t][half] = by;
#pragma unroll
        for (int d = 0; d < kPieces; d++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float x = output[t][d][2 * half + e] * by;
            if (average && empty) x = average[8 * d + lane % 4 * 2 + e];
            output[t][d][2 * half + e] = x;
            finite = fmaf(x, 0.0f, finite);
          }
        // An average is what it should be, also where it is not finite.
        if (finite != 0 && !(average && empty)) broken |= 1u << (2 * t + half);
      }
    return broken;
  }

  // The averages of all values, in shared memory, for rows in which every key is masked; null where none is asked for.
  LLMKERN_DEVICE const float* averages(unsigned char* shared) const {
    bool empty = false;
#pragma unroll
    for (int t = 0; t < kTiles; t++) empty |= largest[t][0] == minus_infinity() || largest[t][1] == minus_infinity();
    if (!p.uniform_empty_rows || p.sink || !p.keys || !__syncthreads_or(empty)) return nullptr;
    auto* found = reinterpret_cast<float*>(shared + kQueryBytes);
    for (int d = static_cast<int>(threadIdx.x); d < kWidth; d += kBlockThreads) {
      float total = 0;
      const T* from = value_data + d;
#pragma unroll 1
      for (int64_t key = 0; key < p.keys && d < p.value_width; key++, from += p.value.row) total += widen(*from);
      found[d] = total / static_cast<float>(p.keys);
    }
    __syncthreads();
    return found;
  }

  // A warp's rows lie in shared memory where its queries were, and go on from there 16 bytes at a time.
  LLMKERN_DEVICE void write() const {
    int first = warp * 16 * kTiles, r = lane / kPieces, c = lane % kPieces;
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int d = 0; d < kPieces; d++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          store_shared4(queries + swizzle<kRowBytes>(first + 16 * t + 8 * half + lane / 4, d) + lane % 4 * 4,
                        narrow_pair(output[t][d][2 * half], output[t][d][2 * half + 1], T{}));
    __syncwarp();
    T* to = const_cast<T*>(start(p.output, h)) + (first_row + first + r) * p.output.row + 8 * c;
#pragma unroll 2
    for (int i = 0; i < 16 * kTiles; i += 32 / kPieces, to += 32 / kPieces * p.output.row) {
      if (first_row + first + r + i >= rules.queries || 8 * c >= p.value_width) continue;
      uint4 x = load_shared16(queries + swizzle<kRowBytes>(first + r + i, c));
      if (w.output_aligned) {
        store16(to, x);
        continue;
      }
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (8 * c + j < p.value_width) to[j] = T{static_cast<uint16_t>(words[j / 2] >> 16 * (j % 2))};
    }
  }

  // Does the rows again whose results are not finite: each of them by the whole warp.
  LLMKERN_DEVICE void repair(uint32_t broken) const {
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t lanes = __ballot_sync(0xffffffffu, broken >> (2 * t + half) & 1);
#pragma unroll 1
        for (int from = 0; from < 32; from += 4) {
          if (!(lanes >> from & 15)) continue;
          float shift = __shfl_sync(0xffffffffu, shift_of(largest[t][half]), from);
          float by = __shfl_sync(0xffffffffu, sum[t][half], from);
          int row = first_row + warp * 16 * kTiles + 16 * t + 8 * half + from / 4;
          if (row < rules.queries) repair_row(row, shift, by);
        }
      }
  }

  // A lane makes the weight of one key at a time, and all of them go through the values of 32 keys.
  LLMKERN_DEVICE void repair_row(int row, float shift, float by) const {
    const T* from = start(p.query, h) + row * p.query.row;
    T* to = const_cast<T*>(start(p.output, h)) + row * p.output.row;
    int end = key_limit(rules.limits, row);
    float total[kWidth / 32] = {};
#pragma unroll 1
    for (int key = key_start(rules.limits, row); key < end; key += 32) {
      float weight = 0;
      int mine = key + lane;
      if (mine < end) {
        float score = 0;
#pragma unroll 1
        for (int d = 0; d < p.width; d++) score = fmaf(widen(from[d]), widen(key_data[mine * p.key.row + d]), score);
        if constexpr (kFeatures) {
          // The functions of mma.sync's scores take one of them.
          float s[1][4] = {{score}};
          bend_scores<T, 1, 1>(p, rules, s, 0, b, h, row, mine);
          score = s[0][0];
        }
        weight = exp2_quick(fmaf(score, w.factor, -shift));
        if constexpr (kFeatures)
          if (p.drop_below && !(kept_weights(p, rules, row, mine) >> mine % 4 & 1)) weight = 0;
      }
#pragma unroll 1
      for (int i = 0; i < 32; i++) {
        float one = __shfl_sync(0xffffffffu, weight, i);
        if (one == 0) continue;
        const T* value = value_data + (key + i) * p.value.row;
#pragma unroll
        for (int j = 0; j < kWidth / 32; j++)
          if (lane + 32 * j < p.value_width) total[j] = fmaf(one, widen(value[lane + 32 * j]), total[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kWidth / 32; j++)
      if (lane + 32 * j < p.value_width) to[lane + 32 * j] = narrow(total[j] * by, T{});
  }

  LLMKERN_DEVICE void run(unsigned char* shared) {
    attend();
    uint32_t broken = finish(averages(shared));
    write();
    if (__any_sync(0xffffffffu, broken)) {
      __syncwarp();
      repair(broken);
    }
  }
};

template <class T, int kWidth, int kTiles, bool kFeatures>
__global__ void __launch_bounds__(kBlockThreads, kTiles == 1 && kWidth == 64 ? 3 : 2)
    attention_forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Work w) {
  extern __shared__ __align__(1024) unsigned char shared[];
  using Block = Forward<T, kWidth, kTiles, kFeatures>;
  note_shared_bytes<Block::kShared>();
  Block(p, w, shared).run(shared);
}

bool aligned(const AttentionTensor& t, int64_t width) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && width % 8 == 0 && t.b % 8 == 0 && t.h % 8 == 0 &&
         t.row % 8 == 0;
}

HowToLaunch launch_of(const AttentionParams& p) {
  HowToLaunch l = {};
  l.width = p.width <= 64 && p.value_width <= 64 ? 64 : 128;
  l.features = p.mask.data || p.softcap != 0 || p.alibi || p.drop_below || !(p.scale > 0);
  // Two for more work with each key and value that is read; one where they would have no rows, or no registers.
  l.row_tiles = l.features || p.queries <= 64 ? 1 : 2;
  l.threads = kBlockThreads;
  int64_t rows = rows_of_block(l.row_tiles);
  l.blocks = p.batch * p.heads * ((p.queries + rows - 1) / rows);
  l.shared_bytes = shared_of(l.width, l.row_tiles);
  return l;
}

Work work_of(const AttentionParams& p, const HowToLaunch& l) {
  int64_t rows = rows_of_block(l.row_tiles);
  return {static_cast<uint32_t>((p.queries + rows - 1) / rows),
          l.features ? kLog2e : kLog2e * p.scale,
          p.drop_below ? static_cast<uint64_t>(*p.seed) : 0,
          aligned(p.query, p.width),
          aligned(p.key, p.width),
          aligned(p.value, p.value_width),
          aligned(p.output, p.value_width)};
}

template <class T, int kWidth, int kTiles, bool kFeatures>
void launch_forward(const AttentionParams& p, const HowToLaunch& l, int device, void* stream) {
  launch_blocks("attention_forward", device, stream, l.blocks, l.threads, l.shared_bytes,
                attention_forward_kernel<T, kWidth, kTiles, kFeatures>, p, work_of(p, l));
}

template <class T, int kWidth>
void forward_typed(const AttentionParams& p, const HowToLaunch& l, int device, void* stream) {
  if (l.features) return launch_forward<T, kWidth, 1, true>(p, l, device, stream);
  l.row_tiles == 1 ? launch_forward<T, kWidth, 1, false>(p, l, device, stream)
                   : launch_forward<T, kWidth, 2, false>(p, l, device, stream);
}

template <class T>
void forward_of(const AttentionParams& p, const HowToLaunch& l, int device, void* stream) {
  l.width == 64 ? forward_typed<T, 64>(p, l, device, stream) : forward_typed<T, 128>(p, l, device, stream);
}

}  // namespace

void attention_forward_cuda(const AttentionParams& p, int device, void* stream) {
  HowToLaunch l = launch_of(p);
  p.dtype == DType::bf16 ? forward_of<Bf16>(p, l, device, stream) : forward_of<Fp16>(p, l, device, stream);
}

}  // namespace llmkern
