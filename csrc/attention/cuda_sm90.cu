// The attention forward for Hopper: wgmma on tiles that TMA brings, by warpgroups with roles of their own.
//
// After FlashAttention-3 (Shah, Bikshandi, Zhang, Thakkar, Ramani and Dao 2024, sections 3.1 and 3.2). A block computes
// 128 queries of one head. Warpgroup 0 is the producer: one thread copies queries, keys and values into shared memory,
// two stages ahead. Warpgroups 1 and 2 compute 64 queries each: the products with tile t of the keys run while those of
// tile t - 1 with the values do, and the softmax of one warpgroup while the other multiplies (sections 3.1 and 3.2).
#include <algorithm>

#include "../common/launch.cuh"
#include "../common/special.cuh"
#include "../common/tensor_map.h"

#ifndef LLMKERN_SM90
#define LLMKERN_SM90  // what is compiled is there
#endif
#include "cuda_sm90.h"
#include "sm90_block.cuh"

namespace llmkern {
namespace {

template <int kCount>
LLMKERN_DEVICE void load_tile(uint16_t (*to)[kCount], const CUtensorMap& map, const uint64_t& barrier, int parts,
                              int row, int h, int b) {
  for (int i = 0; i < parts; i++) tensor_load(to[i], map, barrier, i * kPart, row, h, b);
}

template <int kWidth>
LLMKERN_DEVICE void produce(Tiles<kWidth>& tiles, const CUtensorMap& query, const CUtensorMap& key,
                            const CUtensorMap& value, const Block& block, int kv_head) {
  constexpr int kParts = kWidth / kPart, kTileBytes = kKeys * kWidth * 2;
  barrier_expect(tiles.query_full, kBlockRows * kWidth * 2);
  for (int i = 0; i < kConsumers; i++)
    load_tile(tiles.query[i], query, tiles.query_full, kParts, block.row + i * kRows, block.h, block.b);
  for (int t = 0; t <= block.tiles; t++) {
    if (t < block.tiles) {
      int stage = t % kStages;
      barrier_wait(tiles.key_empty[stage], (t / kStages + 1) % 2);
      barrier_expect(tiles.key_full[stage], kTileBytes);
      load_tile(tiles.key[stage], key, tiles.key_full[stage], kParts, block.first_key(t), kv_head, block.b);
    }
    if (t > 0) {  // values are needed one step after their keys
      int stage = (t - 1) % kStages;
      barrier_wait(tiles.value_empty[stage], ((t - 1) / kStages + 1) % 2);
      barrier_expect(tiles.value_full[stage], kTileBytes);
      load_tile(tiles.value[stage], value, tiles.value_full[stage], kParts, block.first_key(t - 1), kv_head, block.b);
    }
  }
}

// Of two 16-bit numbers, the highest bit of each that is infinite or NaN.
LLMKERN_DEVICE uint32_t not_finite(uint32_t pair, Bf16) { return ((pair & 0x7f807f80u) + 0x00800080u) & 0x80008000u; }
LLMKERN_DEVICE uint32_t not_finite(uint32_t pair, Fp16) { return ((pair & 0x7c007c00u) + 0x04000400u) & 0x80008000u; }
// All bits of those two whose highest one is set, of what not_finite gives.
LLMKERN_DEVICE uint32_t halves(uint32_t highest) { return (highest >> 15) * 0xffffu; }

LLMKERN_DEVICE float log_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y * 0.693147180559945309f;
}
LLMKERN_DEVICE float largest_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
LLMKERN_DEVICE float sum_of_four(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

constexpr float kInfinity = __builtin_inff();

// A warpgroup's 64 queries. A thread has two rows, r = 0 and 1, of which four threads of a warp have all columns.
template <class T, int kWidth>
struct Consumer {
  Tiles<kWidth>& tiles;
  const Work& w;
  const Block& block;
  const int which, thread;  // of the consumers; of the warpgroup
  int row, column;          // of the thread's first element in the warpgroup's rows
  Range seen[2];
  bool uniform[2];
  float scale2;  // scores times this are exponents of two
  float scores[kKeys / 2], output[kWidth / 2] = {};
  uint32_t weights[kKeys / 4];
  float largest[2] = {-kInfinity, -kInfinity}, sums[2] = {}, shrink[2];

  LLMKERN_DEVICE Consumer(Tiles<kWidth>& tiles, const Work& w, const Block& block, int which, int thread)
      : tiles(tiles), w(w), block(block), which(which), thread(thread), scale2(w.scale * 1.44269504088896341f) {
    row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      seen[r] = block.seen(w, block.row + which * kRows + row + 8 * r);
      uniform[r] = w.uniform_empty_rows && seen[r].empty();
    }
  }

  // A warp has no more use for a stage.
  LLMKERN_DEVICE void release(const uint64_t& barrier) {
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(barrier);
  }

  LLMKERN_DEVICE void await_keys(int t) { barrier_wait(tiles.key_full[t % kStages], t / kStages % 2); }
  LLMKERN_DEVICE void issue_scores(int t) {
    uint64_t q = descriptor(tiles.query[which][0]), k = descriptor(tiles.key[t % kStages][0]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kWidth / 16; i++) {
      int part = i * 16 / kPart, inside = i * 32 % kSpan;
      uint64_t a = advance(q, part * kRows * kSpan + inside), b = advance(k, part * kKeys * kSpan + inside);
      if (i == 0)
        wgmma<T, false>(scores, a, b, T{});
      else
        wgmma<T, true>(scores, a, b, T{});
    }
    wgmma_commit();
  }
  LLMKERN_DEVICE void issue_output(int t) {
    uint64_t v = descriptor(tiles.value[t % kStages][0], kKeys * kSpan);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; i++)
      wgmma_rows(output, weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3],
                 advance(v, i * 16 * kSpan), T{});
    wgmma_commit();
  }

  LLMKERN_DEVICE void mask(int t) {
    int first = block.first_key(t) + column;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      uint32_t begin = (uniform[r] ? 0 : seen[r].begin) - first;
      uint32_t count = uniform[r] ? w.keys : seen[r].empty() ? 0 : seen[r].end - seen[r].begin;
#pragma unroll
      for (int i = 2 * r; i < kKeys / 2; i += 4)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float x = uniform[r] ? 0.0f : scores[i + e];
          scores[i + e] = i / 4 * 8 + e - begin < count ? x : -kInfinity;
        }
    }
  }

  // Scores become weights, relative to the largest score so far; `shrink` is what former sums must be multiplied by.
  LLMKERN_DEVICE void soften() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float most = largest[r], sum = 0;
#pragma unroll
      for (int i = 2 * r; i < kKeys / 2; i += 4) most = fmaxf(most, fmaxf(scores[i], scores[i + 1]));
      most = largest_of_four(most);
      float base = most == -kInfinity ? 0.0f : most * scale2;  // no key so far: all weights are 0
      shrink[r] = device::exp2_quick(largest[r] * scale2 - base);
      largest[r] = most;
#pragma unroll
      for (int i = 2 * r; i < kKeys / 2; i += 4) {
        scores[i] = device::exp2_quick(fmaf(scores[i], scale2, -base));
        scores[i + 1] = device::exp2_quick(fmaf(scores[i + 1], scale2, -base));
        sum += scores[i] + scores[i + 1];
      }
      sums[r] = fmaf(sums[r], shrink[r], sum);
    }
  }
  LLMKERN_DEVICE void pack() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; i++) weights[i] = narrow_pair(scores[2 * i], scores[2 * i + 1], T{});
  }

  // A value that some rows see and others do not must not reach these, which it would where it is infinite or NaN: 0
  // times it is NaN. Such values are added to the rows that see them here, and become zeros for wgmma.
  LLMKERN_DEVICE void mend_values(int t) {
    auto& value = tiles.value[t % kStages];
    constexpr int kPieces = kKeys * kWidth / 8, kThreads = kConsumers * kWarpgroup;
    uint4* pieces = reinterpret_cast<uint4*>(value[0]);
    int mine = which * kWarpgroup + thread;
    uint32_t broken = 0;
#pragma unroll
    for (int i = 0; i < kPieces / kThreads; i++) {
      uint4 x = pieces[mine + i * kThreads];
      broken |= not_finite(x.x, T{}) | not_finite(x.y, T{}) | not_finite(x.z, T{}) | not_finite(x.w, T{});
    }
    if (!named_any(kBoth, kThreads, broken != 0)) return;
    int first = block.first_key(t);
#pragma unroll 1
    for (int k = 0; k < kKeys; k++) {
      uint32_t pairs[kWidth / 8], any = 0;
#pragma unroll
      for (int i = 0; i < kWidth / 8; i++) {
        const char* part = reinterpret_cast<const char*>(value[i / 8]);
        pairs[i] = *reinterpret_cast<const uint32_t*>(part + swizzled(k, i % 8) + column * 2);
        any |= not_finite(pairs[i], T{});
      }
      if (any == 0) continue;
      bool sees[2];
#pragma unroll
      for (int r = 0; r < 2; r++)
        sees[r] = uniform[r] ? first + k < w.keys : first + k >= seen[r].begin && first + k < seen[r].end;
#pragma unroll
      for (int i = 0; i < kWidth / 8; i++) {
        uint32_t bad = not_finite(pairs[i], T{});
        float x[2];
        widen_pair(pairs[i] & halves(bad), x, T{});  // 0 where it is finite
#pragma unroll
        for (int e = 0; e < 4; e++) output[4 * i + e] += sees[e / 2] ? x[e % 2] : 0.0f;
      }
    }
    named_sync(kBoth, kThreads);
    auto finite = [](uint32_t pair) { return pair & ~halves(not_finite(pair, T{})); };
#pragma unroll 1
    for (int i = mine; i < kPieces; i += kThreads) {
      uint4 x = pieces[i];
      pieces[i] = make_uint4(finite(x.x), finite(x.y), finite(x.z), finite(x.w));
    }
    async_fence();
    named_sync(kBoth, kThreads);
  }
  LLMKERN_DEVICE void await_values(int t) {
    barrier_wait(tiles.value_full[t % kStages], t / kStages % 2);
    if (block.masked(t)) mend_values(t);
  }

  // The consumers' products take turns, the first consumer's before the second's, so that one has its softmax behind it
  // or before it while the other's products run (section 3.1).
  LLMKERN_DEVICE void take_turn() { named_sync(kTurn + which, kConsumers * kWarpgroup); }
  LLMKERN_DEVICE void pass_turn() { named_arrive(kTurn + 1 - which, kConsumers * kWarpgroup); }

  LLMKERN_DEVICE void run() {
    if (block.tiles == 0) return;
    if (which == 1 && block.tiles > 1) pass_turn();
    barrier_wait(tiles.query_full, 0);
    await_keys(0);
    issue_scores(0);
    wgmma_wait<0>(scores);
    release(tiles.key_empty[0]);
    if (block.masked(0)) mask(0);
    soften();
    pack();
    for (int t = 1; t < block.tiles; t++) {
      await_values(t - 1);
      await_keys(t);
      take_turn();
      issue_scores(t);
      issue_output(t - 1);
      if (which == 0 || t + 1 < block.tiles) pass_turn();
      wgmma_wait<1>(scores);
      release(tiles.key_empty[t % kStages]);
      if (block.masked(t)) mask(t);
      soften();
      wgmma_wait<0>(output);
      keep(weights);
      release(tiles.value_empty[(t - 1) % kStages]);
#pragma unroll
      for (int i = 0; i < kWidth / 2; i++) output[i] *= shrink[i / 2 % 2];
      pack();
    }
    await_values(block.tiles - 1);
    issue_output(block.tiles - 1);
    wgmma_wait<0>(output);
  }

  // Through the place of the queries, once no warp of this warpgroup reads them any more.
  LLMKERN_DEVICE void finish(const CUtensorMap& map) {
    int first = block.row + which * kRows;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float total = sum_of_four(sums[r]);
      bool empty = seen[r].empty();
      int at = first + row + 8 * r;
      if (w.logsumexp && column == 0 && at < w.queries)
        w.logsumexp[(static_cast<int64_t>(block.b) * w.heads + block.h) * w.queries + at] =
            empty ? -static_cast<double>(kInfinity) : static_cast<double>(largest[r]) * w.scale + log_fast(total);
      shrink[r] = total == 0 && empty ? 0.0f : 1.0f / total;
    }
    named_sync(kOwn + which, kWarpgroup);
    int lane = thread % 32, to = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < kWidth / 8; i += 2) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int e = 4 * i + 2 * j;
        x[j] = narrow_pair(output[e] * shrink[j % 2], output[e + 1] * shrink[j % 2], T{});
      }
      store_matrices(shared_address(tiles.query[which][i / 8]) + swizzled(to, i % 8 + lane / 16), x[0], x[1], x[2],
                     x[3]);
    }
    async_fence();
    named_sync(kOwn + which, kWarpgroup);
    if (thread == 0 && first < w.queries) {
      for (int i = 0; i < kWidth / kPart; i++)
        tensor_store(map, tiles.query[which][i], i * kPart, first, block.h, block.b);
      tensor_store_wait();
    }
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_sm90_kernel(const __grid_constant__ CUtensorMap query, const __grid_constant__ CUtensorMap key,
                          const __grid_constant__ CUtensorMap value, const __grid_constant__ CUtensorMap output,
                          const __grid_constant__ Work w) {
  extern __shared__ __align__(1024) char memory[];
  note_shared_bytes<sizeof(Tiles<kWidth>)>();
  auto& tiles = *reinterpret_cast<Tiles<kWidth>*>(memory);
  if (threadIdx.x == 0) {
    if (w.keys > 0) tensor_prefetch(query), tensor_prefetch(key), tensor_prefetch(value);
    barrier_init(tiles.query_full, 1);
    for (int i = 0; i < kStages; i++) {
      barrier_init(tiles.key_full[i], 1), barrier_init(tiles.value_full[i], 1);
      barrier_init(tiles.key_empty[i], kConsumers * 4), barrier_init(tiles.value_empty[i], kConsumers * 4);  // warps
    }
    barrier_init_fence();
  }
  __syncthreads();
  Block block(w);
  int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);  // the same for all, as the compiler sees too
  if (warpgroup == 0) {
    registers_give<kProducerRegisters>();
    if (threadIdx.x == 0 && block.tiles > 0) produce(tiles, query, key, value, block, block.h / w.group);
  } else {
    registers_take<kConsumerRegisters>();
    Consumer<T, kWidth> consumer(tiles, w, block, warpgroup - 1, threadIdx.x % kWarpgroup);
    consumer.run();
    consumer.finish(output);
  }
}

// A tensor (batch, heads, rows, kWidth) whose rows are copied `box_rows` at a time.
template <int kWidth>
CUtensorMap map_of(const char* name, const AttentionTensor& x, int64_t batch, int64_t heads, int64_t rows,
                   int box_rows) {
  return tensor_map({name, x.data, {kWidth, rows, heads, batch}, {1, x.row, x.h, x.b}, {kPart, box_rows, 1, 1}},
                    "attention_forward_sm90");
}

template <class T, int kWidth>
void forward(const AttentionParams& p, int device, void* stream) {
  constexpr const char* kName = "attention_forward_sm90";
  auto* kernel = attention_sm90_kernel<T, kWidth>;
  constexpr int kBytes = sizeof(Tiles<kWidth>);
  DeviceGuard guard(device, kName);
  Work w = {};
  w.lengths = p.mask.lengths, w.lengths_64 = p.mask.lengths_64;
  w.lengths_step = p.mask.lengths_step, w.lengths_more = p.mask.lengths_more;
  w.logsumexp = p.logsumexp;
  w.heads = static_cast<int32_t>(p.heads), w.group = static_cast<int32_t>(p.heads / p.kv_heads);
  w.queries = static_cast<int32_t>(p.queries), w.keys = static_cast<int32_t>(p.keys);
  w.left = static_cast<int32_t>(std::min(p.mask.left, kMost)),
  w.right = static_cast<int32_t>(std::min(p.mask.right, kMost));
  w.row_blocks = static_cast<int32_t>(row_blocks(p));
  w.scale = p.scale, w.bottom_right = p.mask.bottom_right, w.uniform_empty_rows = p.uniform_empty_rows;
  CUtensorMap query = map_of<kWidth>("the query", p.query, p.batch, p.heads, p.queries, kRows);
  CUtensorMap output = map_of<kWidth>("the output", p.output, p.batch, p.heads, p.queries, kRows);
  CUtensorMap key = {}, value = {};  // without keys nothing is read
  if (p.keys > 0) {
    key = map_of<kWidth>("the key", p.key, p.batch, p.kv_heads, p.keys, kKeys);
    value = map_of<kWidth>("the value", p.value, p.batch, p.kv_heads, p.keys, kKeys);
  }
  allow_shared_memory(reinterpret_cast<const void*>(kernel), kName, device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(row_blocks(p) * p.heads * p.batch));
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, query, key, value, output, w), kName, device);
}

// Whether copies can begin at the tensor's rows: addresses and steps are multiples of 16 bytes.
bool copyable(const AttentionTensor& x, int64_t batch, int64_t heads, int64_t rows) {
  if (batch == 0 || heads == 0 || rows == 0) return true;
  auto good = [](int64_t size, int64_t step) {
    return size <= 1 || (step > 0 && step % 8 == 0 && step < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && good(batch, x.b) && good(heads, x.h) && good(rows, x.row);
}

}  // namespace

const char* attention_forward_sm90_unsupported(const AttentionParams& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "its kernel for Hopper computes bfloat16 and float16";
  if (p.width != p.value_width || (p.width != 64 && p.width != 128))
    return "its kernel for Hopper takes heads of width 64 or 128, the same for keys and values";
  if (p.query_bounds.data || p.key_bounds.data || p.pages.table || p.key_scales.data || p.value_scales.data)
    return "its kernel for Hopper takes padded batches alone, not packed sequences, pages or int8 keys";
  if (p.mask.data || p.softcap != 0 || p.alibi || p.sink || p.drop_below)
    return "its kernel for Hopper knows causal masks, windows and key lengths alone";
  if (!(p.scale > 0 && p.scale < __builtin_inff())) return "its kernel for Hopper needs a positive scale";
  if (p.queries > kMost / 2 || p.keys > kMost / 2 || p.batch * p.heads * row_blocks(p) > 2 * kMost - 1)
    return "its kernel for Hopper takes at most 2**29 queries and keys, and 2**31 - 1 blocks of 128 queries";
  if (!copyable(p.query, p.batch, p.heads, p.queries) || !copyable(p.output, p.batch, p.heads, p.queries) ||
      !copyable(p.key, p.batch, p.kv_heads, p.keys) || !copyable(p.value, p.batch, p.kv_heads, p.keys))
    return "its kernel for Hopper needs rows that begin at multiples of 16 bytes, and that no step is 0";
  return nullptr;
}

void attention_forward_sm90(const AttentionParams& p, int device, void* stream) {
  if (const char* reason = attention_forward_sm90_unsupported(p))
    throw std::runtime_error(std::string("attention_forward_sm90: ") + reason);
  if (p.batch == 0 || p.heads == 0 || p.queries == 0) return;
  bool half = p.dtype == DType::f16;
  if (p.width == 64) return half ? forward<Fp16, 64>(p, device, stream) : forward<Bf16, 64>(p, device, stream);
  return half ? forward<Fp16, 128>(p, device, stream) : forward<Bf16, 128>(p, device, stream);
}

}  // namespace llmkern
