// What brings the stages of the int8 tiles for Hopper: copies by TMA, and beside it high digits and scales of groups.
//
// All go round the ring of stages: wait until one is empty, fill it, arrive at its barrier `full`.
#pragma once
#include "sm90_tile.cuh"

namespace llmkern::int8::sm90 {

template <class T>
struct Shared {
  char* memory;
  LLMKERN_DEVICE char* stage(int i) const { return memory + i * T::kStageBytes; }
  LLMKERN_DEVICE typename T::Control& control() const {
    return *reinterpret_cast<typename T::Control*>(memory + T::kControl);
  }
  // Scales of the group that ends with a unit of a stage.
  LLMKERN_DEVICE float* scales(int i, int unit) const {
    return reinterpret_cast<float*>(stage(i) + T::kScales) + unit * T::kScaleCount;
  }
};

LLMKERN_DEVICE int tiles_of(const Int8CudaParams& p) {
  return (static_cast<int>(p.linear.depth) + kDepth - 1) / kDepth;
}

// The digits and the weight, by one thread.
template <class T>
LLMKERN_DEVICE void produce(Shared<T> shared, const CUtensorMap& low, const CUtensorMap& weight, const Block& block,
                            int tiles) {
  auto& control = shared.control();
  Ring<T::kStages> ring;
  for (int t = 0; t < tiles; t++, ring.next()) {
    const uint64_t& full = control.full[ring.stage];
    char* stage = shared.stage(ring.stage);
    barrier_wait(control.empty[ring.stage], ring.parity ^ 1);
    barrier_expect(full, T::kHigh);
    tensor_load(stage + T::kLow, low, full, t * kDepth, block.row, 0, 0);
    tensor_load(stage + T::kWeight, weight, full, t * kDepth, block.first, 0, 0);
    tensor_load(stage + T::kWeight + T::kHalf * kSpan, weight, full, t * kDepth, block.second, 0, 0);
  }
}

LLMKERN_DEVICE void arrive_with_warp(const uint64_t& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// For each of the 8 pieces of tile t whether a row of the block has high digits; the same for all threads.
template <class T>
LLMKERN_DEVICE uint32_t any_high(Shared<T> shared, int t) {
  return __shfl_sync(0xffffffffu, shared.control().any_bits[t / 4] >> (t % 4 * 8) & 0xff, 0);
}

// The high digits of tiles that have any, by the helpers' thread `helper`; of pieces without a bit, zeros.
template <class T>
LLMKERN_DEVICE void copy_high_digits(const Int8CudaParams& p, char* to, int row, int t, int helper) {
  constexpr int kPieces = kSpan / 16;
  const uint32_t high = shared_address(to);
  const int piece = helper % kPieces, rows = static_cast<int>(p.linear.rows);
#pragma unroll 2
  for (int r = helper / kPieces; r < kBlockRows; r += kHelpers / kPieces) {
    const int64_t m = row + r;
    const bool there = m < rows && p.digits.bits[m * p.digits.words + t / 4] >> (t % 4 * 8 + piece) & 1;
    const int64_t from = there ? m * p.digits.stride + t * kDepth + piece * 16 : 0;
    copy16_async(high + swizzled(r, piece), p.digits.high + from, there ? 16 : 0);
  }
}
template <class T>
LLMKERN_DEVICE void bring_high_digits(Shared<T> shared, const Int8CudaParams& p, int row, int tiles, int helper) {
  auto& control = shared.control();
  Ring<T::kStages> ring;
  int behind = -1;  // the stage whose copies still run
  for (int t = 0; t < tiles; t++, ring.next()) {
    const bool any = any_high(shared, t) != 0;
    barrier_wait(control.empty[ring.stage], ring.parity ^ 1);
    if (any) {
      copy_high_digits<T>(p, shared.stage(ring.stage) + T::kHigh, row, t, helper);
      commit_copies();
    }
    if (behind >= 0) {
      if (any)
        wait_for_copies<1>();
      else
        wait_for_copies<0>();
      async_fence();
      arrive_with_warp(control.full[behind]);
    }
    behind = any ? ring.stage : -1;
    if (!any) arrive_with_warp(control.full[ring.stage]);
  }
  if (behind < 0) return;
  wait_for_copies<0>();
  async_fence();
  arrive_with_warp(control.full[behind]);
}

template <class T>
LLMKERN_DEVICE void bring_scales(Shared<T> shared, const Int8CudaParams& p, const Block& block, int tiles, int helper) {
  constexpr int kEach = T::kScaleCount / kHelpers;
  auto& control = shared.control();
  const float* from[kEach];  // the scale of the next group; null: none
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int at = helper + i * kHelpers, c = at - kBlockRows;  // c < 0: of a row
    const int first = c < 0 ? block.row + at : c < T::kHalf ? block.first + c : block.second + c - T::kHalf;
    const int64_t most = c < 0 ? p.linear.rows : c < T::kHalf ? block.most : p.linear.outputs;
    from[i] =
        c < 0 ? p.digits.scale + first * p.digits.groups : p.linear.weight_scale + first * p.weight_scale_stride[0];
    if (first >= most) from[i] = nullptr;
  }
  Ring<T::kStages> ring;
  for (int t = 0; t < tiles; t++, ring.next()) {
    barrier_wait(control.empty[ring.stage], ring.parity ^ 1);
#pragma unroll 1
    for (int unit = 0; unit < T::kUnits; unit++) {
      if (!ends_group(p, t * kDepth + (unit + 1) * T::kUnit, T::kUnit)) continue;
      float scale[kEach];
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        scale[i] = from[i] ? *from[i] : 0.0f;
        if (from[i]) from[i] += i * kHelpers < kBlockRows ? 1 : p.weight_scale_stride[1];
      }
#pragma unroll
      for (int i = 0; i < kEach; i++) shared.scales(ring.stage, unit)[helper + i * kHelpers] = scale[i];
    }
    arrive_with_warp(control.full[ring.stage]);
  }
}

// Which pieces of k have high digits in a row of the block; by all warps but the first.
template <class T>
LLMKERN_DEVICE void gather_bits(Shared<T> shared, const Int8CudaParams& p, int row) {
  constexpr int kFirst = 32;
  auto& any_bits = shared.control().any_bits;
  const int words = static_cast<int>(p.digits.words), rows = min(kBlockRows, static_cast<int>(p.linear.rows) - row);
  const uint32_t* bits = p.digits.bits + static_cast<int64_t>(row) * words;
  for (int i = threadIdx.x - kFirst; i < rows * words; i += kBlockThreads - kFirst)
    if (bits[i]) atomicOr(&any_bits[i % words], bits[i]);
  named_sync(kBits, kBlockThreads - kFirst);
}

}  // namespace llmkern::int8::sm90
