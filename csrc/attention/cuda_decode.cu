// Attention of few queries to many keys for CUDA: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for
// long-context inference"), the online softmax of Milakov and Gimelshein 2018 over pieces of the keys, joined at the
// end.
//
// What counts is that keys and values are read once, at the rate of the memory. The queries of a group of heads, up to
// 16 rows, share a pass: they are the rows of the matrix instructions, which cost the same for one row. The four warps
// of a block take tiles of 16 keys in turn, each with a maximum, sum and output of its own, and meet at the end alone;
// while a tile's products are made, the next tile's keys are on their way.
//
// int8: key scales multiply the scores. Those of the values take part in the softmax's exponent, as log2 |scale|, so
// that weight times scale is rounded where its largest is 1, and the sum of the weights takes them out again.
#include "../common/launch.cuh"
#include "cuda_decode.h"
#include "cuda_decode_tile.cuh"

namespace llmkern {
namespace {

using namespace decode;

constexpr int kWarps = 4, kRows = 16;
constexpr int kMostPieces = 32 * kWarps;  // of a sequence's keys: a thread has the statistics of one
constexpr float kSmallest = 1.17549435e-38f;

LLMKERN_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// The rules of which keys the queries of a sequence see.
struct Limits {
  int64_t diagonal, left, right;
  int keys;

  LLMKERN_DEVICE Limits(const AttentionParams& p, int64_t b) : left(p.mask.left), right(p.mask.right) {
    int64_t n = p.keys;
    if (p.mask.lengths)
      n = clamp(integer_at(p.mask.lengths, p.mask.lengths_64, b * p.mask.lengths_step) + p.mask.lengths_more, 0, n);
    keys = static_cast<int>(n);
    diagonal = p.mask.bottom_right ? n - p.queries : 0;
  }
  // Query i sees the keys [first, end).
  LLMKERN_DEVICE int first(int64_t i) const { return static_cast<int>(clamp(i + diagonal - left, 0, keys)); }
  LLMKERN_DEVICE int end(int64_t i) const { return static_cast<int>(clamp(i + diagonal + right + 1, 0, keys)); }
};

// A block's work: up to 16 rows of one group of heads in one sequence. Row r is query r / group of head r % group.
struct Unit {
  int b, kv_head, begin, rows, group;  // the first row and how many there are

  LLMKERN_DEVICE Unit(const AttentionParams& p, int64_t number) {
    group = static_cast<int>(p.heads / p.kv_heads);
    int64_t all = p.queries * group, blocks = (all + kRows - 1) / kRows;
    int64_t rest = device::divide(number, blocks);
    begin = static_cast<int>(number - rest * blocks) * kRows;
    rows = static_cast<int>(all - begin < kRows ? all - begin : kRows);
    b = static_cast<int>(device::divide(rest, p.kv_heads)), kv_head = static_cast<int>(rest - b * p.kv_heads);
  }
  LLMKERN_DEVICE int query(int row) const { return (begin + row) / group; }
  LLMKERN_DEVICE int head(int row) const { return kv_head * group + (begin + row) % group; }
  LLMKERN_DEVICE int64_t number(const AttentionParams& p, int row) const {  // among all rows
    return (b * p.heads + head(row)) * p.queries + query(row);
  }
};

// The queries as the matrix instructions take them, zeros where there are none: cuda_decode_tile.cuh says which element
// is whose.
template <class T, class K, int kWidth>
LLMKERN_DEVICE void fill_queries(const AttentionParams& p, const Unit& unit, bool aligned, uint4* queries) {
  constexpr int L = device::kLanes<K>;
  auto* words = reinterpret_cast<uint32_t*>(queries);
  for (int item = threadIdx.x; item < kRows * kWidth / 8; item += 32 * kWarps) {
    int row = item / (kWidth / 8), d = item % (kWidth / 8) * 8, width = static_cast<int>(p.width);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (row < unit.rows) {
      const AttentionTensor& t = p.query;
      const T* from =
          reinterpret_cast<const T*>(t.data) + unit.b * t.b + unit.head(row) * t.h + unit.query(row) * t.row;
      x = aligned ? read_piece<true>(from, d, width) : read_piece<false>(from, d, width);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int e = d + 2 * i, step = L / 4 * (e / (4 * L)) + e % L / 4, q = e % (4 * L) / L;
      words[(step * 32 + row % 8 * 4 + q) * 4 + row / 8 + e % 4 / 2 * 2] = word(x, i);
    }
  }
}

// Of a row's weights: the largest score, in units of log2, and the sum relative to it.
struct Sum {
  float max, sum;

  // One more logit, which has no value. Returns what the output is to be multiplied by.
  LLMKERN_DEVICE float add_sink(const AttentionParams& p, int64_t head) {
    if (!p.sink) return 1;
    float sink = p.sink[head] * kLog2E, most = fmaxf(max, sink), safe = most == minus_infinity() ? 0 : most;
    float factor = exp2f(max - safe);
    sum = sum * factor + exp2f(sink - safe), max = most;
    return factor;
  }
  LLMKERN_DEVICE double logsumexp() const {
    return sum == 0 ? static_cast<double>(minus_infinity()) : 0.6931471805599453 * max + log(static_cast<double>(sum));
  }
};

// What one warp, or in the end the block, has of its keys: of rows g and g + 8.
template <class K, int kWidth>
struct State {
  using Values = ValueTile<K, kWidth>;
  static constexpr int L = Values::L, kPieces = Values::kPieces, kNumbers = kPieces * L * 4;
  float output[kPieces][L][4], max[2], sum[2];

  LLMKERN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kNumbers; i++) output[i / (4 * L)][i / 4 % L][i % 4] = 0;
    max[0] = max[1] = minus_infinity(), sum[0] = sum[1] = 0;
  }
  LLMKERN_DEVICE void scale(float low, float high) {
#pragma unroll
    for (int i = 0; i < kNumbers; i++) output[i / (4 * L)][i / 4 % L][i % 4] *= i % 4 < 2 ? low : high;
  }
};

// scale * q k, as the softmax takes it: in units of log2, -infinity where it is not seen.
struct Scores {
  float scale, softcap, slope[2];
  int first[2], end[2];  // the keys that rows g and g + 8 see
  int place[2];          // where they stand among the keys

  LLMKERN_DEVICE Scores(const AttentionParams& p, const Unit& unit, const Limits& limits, int lane)
      : scale(p.scale), softcap(p.softcap) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = lane / 4 + 8 * r;
      bool is = row < unit.rows;
      int64_t i = is ? unit.query(row) : 0;
      first[r] = limits.first(i), end[r] = is ? limits.end(i) : 0, place[r] = static_cast<int>(i + limits.diagonal);
      slope[r] = is && p.alibi ? p.alibi[unit.b * p.alibi_b + unit.head(row) * p.alibi_h] : 0;
    }
  }
  LLMKERN_DEVICE bool sees(int r, int key) const { return key >= first[r] && key < end[r]; }
  LLMKERN_DEVICE float operator()(float x, int r, int key, bool has_alibi) const {
    x *= scale;
    if (softcap != 0) x = softcap * tanhf(x / softcap);
    if (has_alibi) x -= slope[r] * fabsf(static_cast<float>(place[r] - key));
    return x * kLog2E;
  }
};

// Weights and sums of the scores; returns the weights as the products with the values take them.
template <class T, class K, int kWidth>
LLMKERN_DEVICE uint4 soften(State<K, kWidth>& state, float (&s)[2][4], const float* value_scales) {
  float alpha[2];
  float sign[4], inverse[4];  // a value's scale is its size, whose inverse this is, times its sign, or 0
  if constexpr (sizeof(K) == 1) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float size = fmaxf(fabsf(value_scales[j]), kSmallest), log = log2_quick(size);
      inverse[j] = inverse_quick(size), sign[j] = value_scales[j] * inverse[j];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float& x = s[j / 2][2 * r + j % 2];
        if (x != minus_infinity()) x += log;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float most = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
    most = fmaxf(fmaxf(most, __shfl_xor_sync(kAll, most, 2)), state.max[r]);
    float safe = most == minus_infinity() ? 0 : most;
    alpha[r] = most == state.max[r] ? 1 : exp2_quick(state.max[r] - safe);
    state.max[r] = most, state.sum[r] *= alpha[r];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float& x = s[j / 2][2 * r + j % 2];
      bool seen = x != minus_infinity();
      x = exp2_quick(x - safe);
      if constexpr (sizeof(K) == 1) {
        if (seen) state.sum[r] += x * inverse[j], x *= sign[j];
      } else {
        state.sum[r] += x;
      }
    }
  }
  // The largest score changes ever more rarely.
  if (__any_sync(kAll, alpha[0] != 1 || alpha[1] != 1)) state.scale(alpha[0], alpha[1]);
  return make_uint4(device::narrow_pair(s[0][0], s[0][1], T{}), device::narrow_pair(s[0][2], s[0][3], T{}),
                    device::narrow_pair(s[1][0], s[1][1], T{}), device::narrow_pair(s[1][2], s[1][3], T{}));
}

// Products of a tile whose keys not all rows see, with values that are NaN or infinite: 0 * NaN would reach the rows
// that do not see them. So each row by itself, with zeros for what it does not see. The rows are the inner loop, which
// keeps one product's sums in registers and not those of all.
template <class T, class K, int kWidth>
LLMKERN_DEVICE void add_row_by_row(State<K, kWidth>& state, const ValueTile<K, kWidth>& values, uint4 weights,
                                   const Scores& scores, int begin, int lane) {
  using Values = ValueTile<K, kWidth>;
#pragma unroll
  for (int i = 0; i < Values::kPieces * Values::L; i++) {
    int c = i / Values::L;
    float (&output)[4] = state.output[c][i % Values::L];
#pragma unroll 1
    for (int row = 0; row < kRows; row++) {
      int first = __shfl_sync(kAll, row < 8 ? scores.first[0] : scores.first[1], 4 * (row % 8)) - begin;
      int end = __shfl_sync(kAll, row < 8 ? scores.end[0] : scores.end[1], 4 * (row % 8)) - begin;
      unsigned seen = end <= 0 ? 0 : end >= kTile ? 0xffffu : (1u << end) - 1;
      if (first > 0) seen = first >= kTile ? 0 : seen >> first << first;
      float sums[4] = {};
      values.add_some(sums, weights, c, i % Values::L, seen, lane, T{});
      if (lane / 4 == row % 8) {
        if (row < 8)
          output[0] += sums[0], output[1] += sums[1];
        else
          output[2] += sums[2], output[3] += sums[3];
      }
    }
  }
}

// Adds up what the warps have; the last of them then has all of it, and true is returned for it.
template <class K, int kWidth>
LLMKERN_DEVICE bool join_warps(State<K, kWidth>& state, float* outputs, float2 (*sums)[kRows], int warp, int lane) {
  constexpr int L = State<K, kWidth>::L, kNumbers = State<K, kWidth>::kNumbers;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    state.sum[r] += __shfl_xor_sync(kAll, state.sum[r], 1);
    state.sum[r] += __shfl_xor_sync(kAll, state.sum[r], 2);
    if (lane % 4 == 0) sums[warp][lane / 4 + 8 * r] = make_float2(state.max[r], state.sum[r]);
  }
  __syncthreads();
  float own[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float most = minus_infinity(), sum = 0;
    for (int w = 0; w < kWarps; w++) most = fmaxf(most, sums[w][lane / 4 + 8 * r].x);
    float safe = most == minus_infinity() ? 0 : most;
    for (int w = 0; w < kWarps; w++) {
      float2 x = sums[w][lane / 4 + 8 * r];
      sum += x.y * exp2f(x.x - safe);
    }
    own[r] = exp2f(state.max[r] - safe), state.max[r] = most, state.sum[r] = sum;
  }
  state.scale(own[0], own[1]);
  for (int turn = 0; turn < kWarps; turn++) {
    if (warp == turn) {
#pragma unroll
      for (int i = 0; i < kNumbers; i++) {
        float& x = state.output[i / (4 * L)][i / 4 % L][i % 4];
        if (turn > 0) x += outputs[32 * i + lane];
        if (turn < kWarps - 1) outputs[32 * i + lane] = x;
      }
    }
    __syncthreads();
  }
  return warp == kWarps - 1;
}

// Where the largest scores and sums of all pieces lie: behind their outputs, from a whole sector on.
LLMKERN_DEVICE int64_t statistics_begin(const AttentionParams& p, int splits) {
  return (p.batch * p.heads * p.queries * splits * p.value_width + 7) / 8 * 8;
}

// A row, of which each of four neighbouring lanes has parts: `factor` times the sums of row g + 8 r. Two lanes trade
// halves of what they have, so that their stores are whole sectors.
template <class X, class K, int kWidth>
LLMKERN_DEVICE void write_row(X* to, const State<K, kWidth>& state, int r, float factor, int width, bool exists,
                              int lane) {
  constexpr int N = device::kLanes<X>, L = State<K, kWidth>::L;
  bool odd = lane % 2 == 1, vectors = width % N == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
#pragma unroll
  for (int i = 0; i < State<K, kWidth>::kPieces * 2 * L; i += 2 * N) {
    int c = i / (2 * L), d = 8 * L * c + 2 * L * (lane % 4) + i % (2 * L);
    float x[2 * N];
#pragma unroll
    for (int j = 0; j < 2 * N; j++) x[j] = state.output[c][(i + j) % L][2 * r + (i + j) / L % 2] * factor;
    uint4 of_even = device::pack<X>(x), of_odd = device::pack<X>(x + N);
    device::trade_halves(of_even, of_odd, odd);
    if (!exists) continue;
    if (vectors) {
      int at = odd ? d + N - 2 * L : d;
      if (at < width) device::store16(to + at, of_even);
      if (at + 2 * L < width) device::store16(to + at + 2 * L, of_odd);
    } else {
      device::write<false, 2 * N>(to + d, x, width - d);
    }
  }
}

// Where a row of the output begins.
template <class T>
LLMKERN_DEVICE T* output_row(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
  const AttentionTensor& t = p.output;
  return reinterpret_cast<T*>(t.data) + b * t.b + h * t.h + i * t.row;
}

// The rows' outputs, of the only piece; else what the pieces have of them, for join_pieces.
template <class T, class K, int kWidth>
LLMKERN_DEVICE void write_state(const AttentionParams& p, const Unit& unit, const State<K, kWidth>& state,
                                float* workspace, int split, int splits, int lane) {
  int width = static_cast<int>(p.value_width);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = lane / 4 + 8 * r;
    bool exists = row < unit.rows, one = exists && lane % 4 == 0;
    int64_t number = unit.number(p, row), piece = number * splits + split;
    Sum sum{state.max[r], state.sum[r]};
    if (splits == 1) {
      float factor = exists ? sum.add_sink(p, unit.head(row)) : 0;
      factor = sum.sum == 0 ? 0 : factor / sum.sum;
      if (one && p.logsumexp) p.logsumexp[number] = sum.logsumexp();
      write_row(output_row<T>(p, unit.b, unit.head(row), unit.query(row)), state, r, factor, width, exists, lane);
    } else {
      if (one)
        reinterpret_cast<float2*>(workspace + statistics_begin(p, splits))[piece] = make_float2(sum.max, sum.sum);
      write_row(workspace + piece * width, state, r, 1.0f, width, exists, lane);
    }
  }
}

// Blocks that a processor's 65536 registers are to hold without spilling what the loop needs. A warp has two tiles on
// their way, so that these are 24 KB and more of a processor together.
template <class K, int kWidth>
constexpr int kBlocks = kWidth <= 64 || (sizeof(K) == 1 && kWidth <= 128) ? 3 : 2;

template <class T, class K, int kWidth, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps, (kBlocks<K, kWidth>))
    decode_kernel(const __grid_constant__ AttentionParams p, float* workspace, int splits, bool query_aligned) {
  using S = State<K, kWidth>;
  __shared__ uint4 queries[kWidth / 16 * 32];
  __shared__ float outputs[S::kNumbers * 32];
  __shared__ float2 sums[kWarps][kRows];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t number = device::divide(blockIdx.x, splits);
  int split = static_cast<int>(blockIdx.x - number * splits);
  Unit unit(p, number);
  Limits limits(p, unit.b);
  // The block's rows see keys in [first, end); all of them see those in [all_first, all_end).
  int first = limits.first(unit.query(0)), end = limits.end(unit.query(unit.rows - 1));
  int all_first = limits.first(unit.query(unit.rows - 1)), all_end = limits.end(unit.query(0));
  int from = first / kTile, tiles = end > first ? (end + kTile - 1) / kTile - from : 0;
  int each = (tiles + splits - 1) / splits, tile = from + split * each;
  int last = tile + each < from + tiles ? tile + each : from + tiles;
  Scores scores(p, unit, limits, lane);
  fill_queries<T, K, kWidth>(p, unit, query_aligned, queries);
  __syncthreads();

  S state;
  state.clear();
  KeyTile<K, kWidth> keys;
  ValueTile<K, kWidth> values;
  Place place = {0, -1};
  float scale = 0;                        // lane i < 16: of key i of the tile; i >= 16: of value i - 16
  constexpr bool kAhead = kWidth <= 128;  // the next tile's keys and this one's values fit into registers together
  auto read_keys = [&](int tile) {
    int key = tile * kTile + lane % kTile;
    place = find(p.pages, unit.b, key, tile < last && key >= first && key < end);
    keys.template read<kAligned>(p.key, unit.kv_head, place, static_cast<int>(p.width), lane);
    if constexpr (sizeof(K) == 1) {
      const AttentionScales& t = lane < kTile ? p.key_scales : p.value_scales;
      scale = place.row < 0 ? 1 : t.data[place.page * t.b + unit.kv_head * t.h + place.row * t.row];
    }
  };
  auto read_values = [&] {
    values.template read<kAligned>(p.value, unit.kv_head, place, static_cast<int>(p.value_width), lane);
  };
  tile += warp;
  if (kAhead) read_keys(tile);
  for (; tile < last; tile += kWarps) {
    int begin = tile * kTile;
    if (kAhead)
      read_values();
    else
      read_keys(tile);
    float s[2][4] = {}, key_scales[4], value_scales[4];
    keys.multiply_by(queries, s, lane, T{});
    if constexpr (sizeof(K) == 1) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int at = ValueTile<K, kWidth>::key(j, lane);
        key_scales[j] = __shfl_sync(kAll, scale, at), value_scales[j] = __shfl_sync(kAll, scale, at + kTile);
      }
    }
    if (kAhead)
      read_keys(tile + kWarps);
    else
      read_values();
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int key = begin + ValueTile<K, kWidth>::key(j, lane);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float& x = s[j / 2][2 * r + j % 2];
        if constexpr (sizeof(K) == 1) x *= key_scales[j];
        x = scores.sees(r, key) ? scores(x, r, key, p.alibi != nullptr) : minus_infinity();
      }
    }
    uint4 weights = soften<T>(state, s, value_scales);
    if constexpr (sizeof(K) != 1) {
      int read_first = begin < first ? first : begin, read_end = begin + kTile < end ? begin + kTile : end;
      bool shared = read_first >= all_first && read_end <= all_end;
      if (!shared && __any_sync(kAll, !values.finite(T{}))) {
        add_row_by_row<T>(state, values, weights, scores, begin, lane);
        continue;
      }
    }
    values.add_to(state.output, weights, T{});
  }
  if (join_warps(state, outputs, sums, warp, lane)) write_state<T>(p, unit, state, workspace, split, splits, lane);
}

constexpr int kThreads = 32 * kWarps;

// The sum of what the pieces of a row from `piece` on, every `step`-th, have of four elements, by the pieces' weights.
template <bool kAligned>
LLMKERN_DEVICE void add_pieces(const float* from, const float* weights, int piece, int step, int splits, int width,
                               int there, float (&sums)[4]) {
#pragma unroll(kAligned ? 2 : 1)
  for (; piece < splits; piece += step) {
    float weight = weights[piece], x[4];
    if (weight < 0) continue;
    device::read<kAligned, 4>(from + int64_t{piece} * width, x, there);
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] += weight * x[i];
  }
}

// One row of the output from its pieces, which lie side by side. A thread takes four elements of some of the pieces.
template <class T>
__global__ void __launch_bounds__(kThreads)
    join_pieces_kernel(const __grid_constant__ AttentionParams p, const float* workspace, int splits) {
  __shared__ float weights[kMostPieces], most_of[kWarps], sum_of[kWarps];
  __shared__ float4 outputs[kThreads];
  int64_t rows = p.batch * p.heads * p.queries;
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, width = static_cast<int>(p.value_width);
  int units = width > 4 ? (width + 3) / 4 : 1, at_once = kThreads / units < splits ? kThreads / units : splits;
  int unit = thread % units, first = thread / units;
  const auto* statistics = reinterpret_cast<const float2*>(workspace + statistics_begin(p, splits));
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float2 own = thread < splits ? statistics[row * splits + thread] : make_float2(minus_infinity(), 0);
    float most = own.x;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, step));
    if (lane == 0) most_of[warp] = most;
    __syncthreads();
    Sum total{minus_infinity(), 0};
#pragma unroll
    for (int w = 0; w < kWarps; w++) total.max = fmaxf(total.max, most_of[w]);
    float safe = total.max == minus_infinity() ? 0 : total.max;
    // A piece that saw no key has no part: its output is 0 by a weight that may be NaN.
    float weight = own.y == 0 ? -1 : exp2f(own.x - safe), sum = own.y == 0 ? 0 : own.y * weight;
    if (thread < splits) weights[thread] = weight;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (lane == 0) sum_of[warp] = sum;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; w++) total.sum += sum_of[w];

    float x[4] = {};
    if (first < at_once) {
      const float* from = workspace + row * splits * width + 4 * unit;
      if (width % 4 == 0)
        add_pieces<true>(from, weights, first, at_once, splits, width, 4, x);
      else
        add_pieces<false>(from, weights, first, at_once, splits, width, width - 4 * unit, x);
      outputs[thread] = make_float4(x[0], x[1], x[2], x[3]);
    }
    __syncthreads();
    int64_t of_head = device::divide(row, p.queries), i = row - of_head * p.queries;
    int64_t b = device::divide(of_head, p.heads), h = of_head - b * p.heads;
    float factor = total.add_sink(p, h);
    factor = total.sum == 0 ? 0 : factor / total.sum;
    if (thread == 0 && p.logsumexp) p.logsumexp[row] = total.logsumexp();
    if (32 * warp >= units) continue;
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = 0;
    for (int s = 0; s < at_once && thread < units; s++) {
      float4 y = outputs[s * units + thread];
      x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] *= factor;
    uint32_t low = device::narrow_pair(x[0], x[1], T{}), high = device::narrow_pair(x[2], x[3], T{});
    uint32_t next_low = __shfl_down_sync(kAll, low, 1), next_high = __shfl_down_sync(kAll, high, 1);
    T* to = output_row<T>(p, b, h, i) + 4 * thread;
    if (width % 8 == 0 && reinterpret_cast<uintptr_t>(to - 4 * thread) % 16 == 0) {
      if (thread < units && thread % 2 == 0) device::store16(to, make_uint4(low, high, next_low, next_high));
    } else {
      device::write<false, 4>(to, x, width - 4 * thread);
    }
  }
}

template <class K>
bool aligned(const AttentionTensor& t, int64_t width) {
  constexpr int64_t N = device::kLanes<K>;
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.b % N == 0 && t.h % N == 0 && t.row % N == 0 &&
         width % N == 0;
}

template <class T, class K>
void decode_typed(const AttentionParams& p, float* workspace, int splits, int device, void* stream) {
  bool vectors = aligned<K>(p.key, p.width) && aligned<K>(p.value, p.value_width);
  int64_t widest = p.width > p.value_width ? p.width : p.value_width;
  auto* kernel = decode_kernel<T, K, 256, false>;
  if (vectors && widest > 128) kernel = decode_kernel<T, K, 256, true>;
  if (vectors && widest <= 128) kernel = decode_kernel<T, K, 128, true>;
  // Of int8 values, 16 bytes a thread are 128 elements of a row.
  if constexpr (sizeof(K) != 1)
    if (vectors && widest <= 64) kernel = decode_kernel<T, K, 64, true>;
  if (!p.batch || !p.heads || !p.queries) return;
  if (splits < 1 || splits > kMostPieces)
    throw std::invalid_argument("attention_decode: expected 1 to " + std::to_string(kMostPieces) + " pieces, got " +
                                std::to_string(splits));
  int64_t rows = p.queries * (p.heads / p.kv_heads), blocks = p.batch * p.kv_heads * ((rows + kRows - 1) / kRows);
  blocks *= splits;
  device::launch_blocks("attention_decode", device, stream, blocks, 32 * kWarps, 0, kernel, p, workspace, splits,
                        aligned<T>(p.query, p.width));
  if (splits == 1) return;
  int64_t all = p.batch * p.heads * p.queries;
  device::launch_blocks("attention_decode", device, stream, all < device::kMostBlocks ? all : device::kMostBlocks,
                        32 * kWarps, 0, join_pieces_kernel<T>, p, static_cast<const float*>(workspace), splits);
}

}  // namespace

void attention_decode_cuda(const AttentionParams& p, float* workspace, int splits, int device, void* stream) {
  bool bf16 = p.dtype == DType::bf16;
  if (p.key_scales.data)
    return bf16 ? decode_typed<Bf16, int8_t>(p, workspace, splits, device, stream)
                : decode_typed<Fp16, int8_t>(p, workspace, splits, device, stream);
  return bf16 ? decode_typed<Bf16, Bf16>(p, workspace, splits, device, stream)
              : decode_typed<Fp16, Fp16>(p, workspace, splits, device, stream);
}

}  // namespace llmkern
