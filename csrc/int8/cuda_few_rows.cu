// Products of a few rows of activations with an int8 weight, on CUDA: the way of the weight from memory is the cost.
//
// A block takes four outputs, and its threads share out k, 16 values of each output at a time: every byte of the weight
// is read once, by 16-byte loads, and meets all rows in registers. The digits of the rows come from the first-level
// cache, where they stay since the weight goes past it. At the end a warp adds its lanes, and the block its warps.
#include "../common/launch.cuh"
#include "../common/mma_int8.cuh"
#include "cuda_finish.cuh"

namespace llmkern::int8 {

using device::kThreads;

constexpr int kOutputs = 4;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr int kStep = kThreads * kDigitPiece;  // of k that a block takes at once

LLMKERN_DEVICE uint4 load_once(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(p)));
  return x;
}

// Output i of a block; of pairs, two neighbouring first ones and their seconds.
LLMKERN_DEVICE int64_t output_of(const Int8CudaParams& p, int i) {
  if (!p.pairs) return int64_t{blockIdx.x} * kOutputs + i;
  const int64_t first = int64_t{blockIdx.x} * 2 + i % 2;
  return i < 2 ? first : first + p.linear.outputs / 2;
}
LLMKERN_DEVICE bool is_output(const Int8CudaParams& p, int i) {
  return p.pairs ? int64_t{blockIdx.x} * 2 + i % 2 < p.linear.outputs / 2 : output_of(p, i) < p.linear.outputs;
}

LLMKERN_DEVICE int32_t join_lanes(int32_t x) { return __reduce_add_sync(0xffffffffu, x); }
LLMKERN_DEVICE float join_lanes(float x) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, apart));
  return x;
}

// kRows: at least those of the call; a row that is not there is computed as the last one is.
template <int kRows, Digits kDigits>
__global__ void __launch_bounds__(kThreads) few_rows_kernel(const __grid_constant__ Int8CudaParams p) {
  constexpr bool kGroups = kDigits == Digits::groups, kTwo = kDigits == Digits::two;
  constexpr int kSums = kRows * kOutputs;
  const Int8LinearParams& l = p.linear;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int depth = static_cast<int>(l.depth), rows = static_cast<int>(l.rows);

  const int8_t* weight[kOutputs];
  int64_t output[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; o++) {
    output[o] = is_output(p, o) ? output_of(p, o) : output_of(p, 0);
    weight[o] = p.weight + output[o] * p.weight_stride;
  }
  int32_t low[kRows][kOutputs] = {}, high[kTwo ? kRows : 1][kOutputs] = {};
  float total[kGroups ? kRows : 1][kOutputs] = {};

  for (int k = threadIdx.x * kDigitPiece; k < depth; k += kStep) {
    uint4 w[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; o++) w[o] = load_once(weight[o] + k);
    float weight_scale[kOutputs];
    const int group = kGroups ? k / static_cast<int>(l.quantize.group) : 0;
    if (kGroups)
#pragma unroll
      for (int o = 0; o < kOutputs; o++)
        weight_scale[o] = l.weight_scale[output[o] * p.weight_scale_stride[0] + group * p.weight_scale_stride[1]];
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      const int64_t row = min(m, rows - 1), at = row * p.digits.stride + k;
      const uint4 x = device::load16(p.digits.low + at);
      if constexpr (kGroups) {
        const float scale = p.digits.scale[row * p.digits.groups + group];
#pragma unroll
        for (int o = 0; o < kOutputs; o++) {
          const float sum = static_cast<float>(device::dot16<true>(x, w[o], 0));
          total[m][o] = __fadd_rn(total[m][o], __fmul_rn(sum, __fmul_rn(scale, weight_scale[o])));
        }
      } else {
#pragma unroll
        for (int o = 0; o < kOutputs; o++) low[m][o] = device::dot16<false>(x, w[o], low[m][o]);
      }
      if constexpr (kTwo) {
        const uint32_t bits = p.digits.bits[row * p.digits.words + k / kDigitsOfWord];
        if (bits >> (k / kDigitPiece % 32) & 1) {
          const uint4 y = device::load16(p.digits.high + at);
#pragma unroll
          for (int o = 0; o < kOutputs; o++) high[m][o] = device::dot16<true>(y, w[o], high[m][o]);
        }
      }
    }
  }

  __shared__ int32_t lows[kWarps][kSums], highs[kTwo ? kWarps : 1][kSums];
  __shared__ float totals[kGroups ? kWarps : 1][kSums];
#pragma unroll
  for (int m = 0; m < kRows; m++)
#pragma unroll
    for (int o = 0; o < kOutputs; o++) {
      if constexpr (kGroups) {
        const float sum = join_lanes(total[m][o]);
        if (lane == 0) totals[warp][m * kOutputs + o] = sum;
      } else {
        const int32_t sum = join_lanes(low[m][o]);
        if (lane == 0) lows[warp][m * kOutputs + o] = sum;
      }
      if constexpr (kTwo) {
        const int32_t sum = join_lanes(high[m][o]);
        if (lane == 0) highs[warp][m * kOutputs + o] = sum;
      }
    }
  __syncthreads();
  if (threadIdx.x >= kSums) return;
  const int i = threadIdx.x, o = i % kOutputs, m = i / kOutputs;
  const int64_t row = min(m, rows - 1);
  const Column c = column_of(p, is_output(p, o) ? output_of(p, o) : output_of(p, 0));
  float y = 0.0f;
  if constexpr (kGroups) {
#pragma unroll
    for (int w = 0; w < kWarps; w++) y = __fadd_rn(y, totals[w][i]);
    y = __fadd_rn(y, c.bias);
  } else {
    int32_t sum = 0, high_sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      sum += lows[w][i];
      if (kTwo) high_sum += highs[w][i];
    }
    y = linear(c, p.digits.scale[row], p.digits.zero[row], sum, high_sum);
  }
  const float second = __shfl_xor_sync(0xffffffffu >> (32 - kSums), y, 2);  // of a pair, whose first is o = 0 or 1
  if (m >= rows || !is_output(p, o) || (p.pairs && o >= 2)) return;
  const int64_t n = output_of(p, o);
  put(l, m, n, finish(l, p.pairs, m, n, y, second));
}

template <Digits kDigits>
void few_rows(const Int8CudaParams& p, int device, void* stream) {
  const int64_t outputs = p.pairs ? p.linear.outputs / 2 : p.linear.outputs, of_block = p.pairs ? 2 : kOutputs;
  const int64_t rows = p.linear.rows;
  auto* kernel = rows <= 1   ? few_rows_kernel<1, kDigits>
                 : rows <= 2 ? few_rows_kernel<2, kDigits>
                 : rows <= 4 ? few_rows_kernel<4, kDigits>
                             : few_rows_kernel<8, kDigits>;
  device::launch_blocks("int8_few_rows", device, stream, (outputs + of_block - 1) / of_block, kThreads, 0, kernel, p);
}

}  // namespace llmkern::int8

namespace llmkern {

void int8_few_rows_cuda(const Int8CudaParams& p, int device, void* stream) {
  switch (p.digits.kind) {
    case Digits::one:
      return int8::few_rows<Digits::one>(p, device, stream);
    case Digits::two:
      return int8::few_rows<Digits::two>(p, device, stream);
    default:
      return int8::few_rows<Digits::groups>(p, device, stream);
  }
}

}  // namespace llmkern
