// Rows of activations as integers, on CUDA: the same integers as csrc/int8/quantize.h makes, bit for bit.
//
// A block takes a row. It comes from memory once, by 16-byte loads, and stays in shared memory: its range is found
// while it comes, then, where outliers are looked for, the mean magnitude by one warp that adds in the order that the
// reference defines, and at last the integers, 16 to a thread.
#include "../common/device.cuh"
#include "../common/launch.cuh"
#include "cuda.h"

namespace llmkern::int8 {

using device::kLanes;
using device::kThreads;

constexpr unsigned kWarp = 0xffffffffu;  // all lanes
constexpr int kWarps = kThreads / 32;
constexpr int kSums = 64;  // of magnitudes: element k in sum k % 64; a staged row is filled with zeros to a multiple
constexpr float kUsual = 6.0f, kMost = 32000.0f, kSmallestScale = 0x1p-126f, kLargest = 0x1.fffffep127f;

struct Extent {
  float least, most;  // 0 lies between
  float broken;       // NaN where an element is NaN or infinite, else 0
  LLMKERN_DEVICE void look(float x) {
    least = fminf(least, x), most = fmaxf(most, x);
    broken = fmaf(x, 0.0f, broken);
  }
  LLMKERN_DEVICE void join(const Extent& e) {
    least = fminf(least, e.least), most = fmaxf(most, e.most), broken += e.broken;
  }
  LLMKERN_DEVICE void join_lanes() {
#pragma unroll
    for (int apart = 16; apart; apart /= 2)
      join({__shfl_xor_sync(kWarp, least, apart), __shfl_xor_sync(kWarp, most, apart),
            __shfl_xor_sync(kWarp, broken, apart)});
  }
  LLMKERN_DEVICE float magnitude() const { return fmaxf(-least, most); }
};

LLMKERN_DEVICE float usable(float scale) {
  if (scale < kSmallestScale) return 1.0f;
  return scale > kLargest ? device::bits_to_float(0x7fc00000u) : scale;
}

struct Scale {
  float scale;
  int32_t zero;
};
// No product is added in one rounding: the reference rounds each.
LLMKERN_DEVICE Scale choose(const QuantizeParams& q, const Extent& e, float mean) {
  if (q.scaling == Scaling::given) return {q.given[0], static_cast<int32_t>(q.given[1])};
  const float magnitude = e.magnitude();
  if (q.scaling == Scaling::wide) return {usable(__fdiv_rn(magnitude, kMost)), 128};
  if (q.scaling == Scaling::symmetric) return {usable(__fdiv_rn(magnitude, 127.0f)), 128};
  float least = e.least, most = e.most;
  if (q.outliers) {
    const float bound = __fmul_rn(kUsual, mean);
    least = fmaxf(least, -bound), most = fminf(most, bound);
  }
  float scale = __fdiv_rn(__fsub_rn(most, least), 255.0f);
  if (q.outliers) scale = fmaxf(scale, __fdiv_rn(magnitude, kMost));
  scale = usable(scale);
  const float shift = rintf(__fmul_rn(-least, __frcp_rn(scale)));
  return {scale, static_cast<int32_t>(fminf(fmaxf(shift, 0.0f), 255.0f))};
}

// kLanes elements of a row in 16 bytes; of the last ones of a row, and where x is not aligned, one by one.
template <class T>
LLMKERN_DEVICE uint4 load_piece(const T* x, int64_t left, bool aligned) {
  if (aligned && left >= kLanes<T>) return device::load16(x);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) {
    if (i >= left) continue;
    if constexpr (sizeof(T) == 4)
      words[i] = device::float_to_bits(x[i]);
    else
      words[i / 2] |= static_cast<uint32_t>(x[i].bits) << (i % 2 * 16);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T>
LLMKERN_DEVICE void widen_piece(uint4 x, float* out) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4)
      out[i] = device::bits_to_float(words[i]);
    else
      device::widen_pair(words[i], out + 2 * i, T{});
  }
}

// Where piece i of 16 bytes of a row lies in shared memory: exchanged so that neighbouring threads, which read 16
// elements each, do not meet in a bank.
LLMKERN_DEVICE int place(int i) { return i ^ (i >> 3 & 3); }
template <class T>
LLMKERN_DEVICE const T* element(const uint4* row, int k) {
  return reinterpret_cast<const T*>(row + place(k / kLanes<T>)) + k % kLanes<T>;
}

// Brings the row into shared memory, and finds this thread's part of its extent.
template <class T>
LLMKERN_DEVICE Extent stage_row(const T* x, int64_t depth, int filled, uint4* row) {
  constexpr int N = kLanes<T>;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  Extent e = {};
#pragma unroll 4
  for (int k = threadIdx.x * N; k < filled; k += kThreads * N) {
    const uint4 piece = load_piece(x + k, depth - k, aligned);
    row[place(k / N)] = piece;
    float values[N];
    widen_piece<T>(piece, values);
#pragma unroll
    for (int i = 0; i < N; i++) e.look(values[i]);
  }
  return e;
}

// The sum of magnitudes in its one order, by a warp: lane l adds those of places 2 l and 2 l + 1.
template <class T>
LLMKERN_DEVICE float sum_of_magnitudes(const uint4* row, int filled, int lane) {
  float a = 0.0f, b = 0.0f;
#pragma unroll 8
  for (int k = 2 * lane; k < filled; k += kSums) {
    float pair[2];
    if constexpr (sizeof(T) == 4) {
      const float2 two = *reinterpret_cast<const float2*>(element<T>(row, k));
      pair[0] = two.x, pair[1] = two.y;
    } else {
      device::widen_pair(*reinterpret_cast<const uint32_t*>(element<T>(row, k)), pair, T{});
    }
    a = __fadd_rn(a, fabsf(pair[0])), b = __fadd_rn(b, fabsf(pair[1]));
  }
#pragma unroll
  for (int half = kSums / 4; half; half /= 2) {
    a = __fadd_rn(a, __shfl_down_sync(kWarp, a, half));
    b = __fadd_rn(b, __shfl_down_sync(kWarp, b, half));
  }
  return __fadd_rn(a, b);  // lane 0's is the sum
}

// The integers of 16 elements from k on, and whether one of them has a high digit.
template <class T>
LLMKERN_DEVICE bool digits16(const uint4* row, int k, Scale s, Digits digits, uint4& low, uint4& high) {
  constexpr int N = kLanes<T>;
  const float inverse = __frcp_rn(s.scale);
  uint32_t lows[4] = {}, highs[4] = {};
  bool any = false;
#pragma unroll
  for (int i = 0; i < kDigitPiece; i += N) {
    float values[N];
    widen_piece<T>(row[place((k + i) / N)], values);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float scaled = fminf(fmaxf(__fmul_rn(values[j], inverse), -kMost), kMost);
      int u = __float2int_rn(scaled) + s.zero;
      if (digits != Digits::two) u = min(max(u, 0), 255);
      if (digits == Digits::groups) u -= 128;
      const int at = i + j, shift = at % 4 * 8;
      lows[at / 4] |= static_cast<uint32_t>(u & 255) << shift;
      highs[at / 4] |= static_cast<uint32_t>(u >> 8 & 255) << shift;
      any = any || (u >> 8) != 0;
    }
  }
  low = make_uint4(lows[0], lows[1], lows[2], lows[3]);
  high = make_uint4(highs[0], highs[1], highs[2], highs[3]);
  return any;
}

// Dynamic shared memory: the row, then a scale for each group.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ Int8CudaParams p) {
  extern __shared__ uint4 stage[];
  __shared__ Extent extents[kWarps];
  __shared__ float sum;
  const Int8LinearParams& l = p.linear;
  const Digits digits = p.digits.kind;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int depth = static_cast<int>(l.depth), filled = (depth + kSums - 1) / kSums * kSums;
  const int64_t m = blockIdx.x;
  float* group_scales = reinterpret_cast<float*>(stage + filled / kLanes<T>);

  Extent e = stage_row(static_cast<const T*>(l.x) + m * l.x_stride, l.depth, filled, stage);
  Scale s = {0.0f, 128};
  if (digits == Digits::groups) {
    __syncthreads();
    const int group = static_cast<int>(l.quantize.group);
    for (int g = warp; g < p.digits.groups; g += kWarps) {
      Extent part = {};
      for (int k = g * group + lane; k < min((g + 1) * group, depth); k += 32)
        part.look(device::widen(*element<T>(stage, k)));
      part.join_lanes();
      if (lane == 0) group_scales[g] = choose(l.quantize, part, 0.0f).scale + part.broken;
    }
    __syncthreads();
    for (int g = threadIdx.x; g < p.digits.groups; g += kThreads)
      p.digits.scale[m * p.digits.groups + g] = group_scales[g];
  } else {
    e.join_lanes();
    if (lane == 0) extents[warp] = e;
    __syncthreads();
    e = extents[0];
#pragma unroll
    for (int i = 1; i < kWarps; i++) e.join(extents[i]);
    float mean = 0.0f;
    if (l.quantize.outliers) {
      if (warp == 0) {
        const float total = sum_of_magnitudes<T>(stage, filled, lane);
        if (lane == 0) sum = total;
      }
      __syncthreads();
      mean = depth ? __fdiv_rn(sum, static_cast<float>(depth)) : 0.0f;
    }
    s = choose(l.quantize, e, mean);
    if (threadIdx.x == 0) {
      p.digits.scale[m] = s.scale + e.broken;  // NaN here is all that makes such a row NaN
      p.digits.zero[m] = s.zero;
    }
  }

  for (int first = warp * kDigitsOfWord; first < depth; first += kWarps * kDigitsOfWord) {
    const int k = first + lane * kDigitPiece;
    uint4 low, high;
    bool any = false;
    if (k < depth) {
      if (digits == Digits::groups) s.scale = group_scales[k / static_cast<int>(l.quantize.group)];
      any = digits16<T>(stage, k, s, digits, low, high);
      device::store16(p.digits.low + m * p.digits.stride + k, low);
    }
    if (digits != Digits::two) continue;
    const uint32_t bits = __ballot_sync(kWarp, any);
    if (any) device::store16(p.digits.high + m * p.digits.stride + k, high);
    if (lane == 0) p.digits.bits[m * p.digits.words + first / kDigitsOfWord] = bits;
  }
}

template <class T>
void quantize_typed(const Int8CudaParams& p, int device, void* stream) {
  const int64_t filled = (p.linear.depth + kSums - 1) / kSums * kSums;
  const size_t shared = static_cast<size_t>(filled) * sizeof(T) +
                        (p.linear.quantize.group ? static_cast<size_t>(p.digits.groups) * sizeof(float) : 0);
  device::launch_blocks("int8_quantize", device, stream, p.linear.rows, kThreads, static_cast<int>(shared),
                        quantize_kernel<T>, p);
}

}  // namespace llmkern::int8

namespace llmkern {

void int8_quantize_cuda(const Int8CudaParams& p, int device, void* stream) {
  switch (p.linear.dtype) {
    case DType::bf16:
      return int8::quantize_typed<Bf16>(p, device, stream);
    case DType::f16:
      return int8::quantize_typed<Fp16>(p, device, stream);
    default:
      return int8::quantize_typed<float>(p, device, stream);
  }
}

}  // namespace llmkern
