// The sinusoidal add and rotary for CUDA.
//
// Both move memory and compute next to nothing: a thread reads and writes 16 bytes at a time where addresses and
// strides allow it (kAligned) and single elements elsewhere. Neighbouring threads take neighbouring groups of one row.
#include "../common/device.cuh"
#include "../common/launch.cuh"
#include "cuda.h"

namespace llmkern {
namespace {

using device::divide;
using device::kLanes;
using device::kThreads;
using device::read;
using device::write;

LLMKERN_DEVICE int at_most(int64_t left, int most) { return left < most ? static_cast<int>(left) : most; }

// ---- sinusoidal add

// Factors (0 or keep_scale) of four neighbouring elements: Philox4x32-10, as params.h describes it.
LLMKERN_DEVICE void dropout_factors(const SinusoidalAddParams& p, int64_t row, int64_t block, float* factors) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(row);
  uint32_t c2 = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(p.seed), k1 = static_cast<uint32_t>(p.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    uint32_t low0 = 0xD2511F53u * c0, low1 = 0xCD9E8D57u * c2;
    uint32_t high0 = device::multiply_high(0xD2511F53u, c0), high1 = device::multiply_high(0xCD9E8D57u, c2);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
  }
  factors[0] = c0 < p.drop_below ? 0.0f : p.keep_scale;
  factors[1] = c1 < p.drop_below ? 0.0f : p.keep_scale;
  factors[2] = c2 < p.drop_below ? 0.0f : p.keep_scale;
  factors[3] = c3 < p.drop_below ? 0.0f : p.keep_scale;
}

template <bool kAligned, class T>
LLMKERN_DEVICE void add_group(const SinusoidalAddParams& p, int64_t row, int64_t d) {
  constexpr int N = kLanes<T>;
  int n = at_most(p.width - d, N);
  int64_t s = divide(row, p.batch), b = row - s * p.batch;
  float y[N], pe[N] = {};
  read<kAligned, N>(static_cast<const T*>(p.x) + s * p.x_stride_s + b * p.x_stride_b + d, y, n);
  if (p.pe) read<kAligned, N>(p.pe + s * p.pe_stride_s + d, pe, n);
#pragma unroll
  for (int i = 0; i < N; i++) y[i] = p.pe ? fmaf(y[i], p.scale, pe[i]) : y[i] * p.scale;
  if (p.drop_below) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float factors[4];
      dropout_factors(p, row, d / 4 + i / 4, factors);
#pragma unroll
      for (int j = 0; j < 4; j++) y[i + j] *= factors[j];
    }
  }
  write<kAligned, N>(static_cast<T*>(p.out) + s * p.out_stride_s + b * p.out_stride_b + d, y, n);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    sinusoidal_add_kernel(const __grid_constant__ SinusoidalAddParams p, int64_t items) {
  int64_t groups = (p.width + kLanes<T> - 1) / kLanes<T>;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < items; i += int64_t{gridDim.x} * kThreads) {
    int64_t row = divide(i, groups), d = (i - row * groups) * kLanes<T>;
    if (kAligned && d + kLanes<T> <= p.width)
      add_group<true, T>(p, row, d);
    else
      add_group<false, T>(p, row, d);
  }
}

// Whether the address, and every row's with these strides of elements, is a multiple of 16 bytes.
template <class T, class... Strides>
bool aligned(const void* p, Strides... strides) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ((strides % kLanes<T> == 0) && ...);
}

template <class T>
void sinusoidal_add_typed(const SinusoidalAddParams& p, int device, void* stream) {
  int64_t items = p.length * p.batch * ((p.width + kLanes<T> - 1) / kLanes<T>);
  bool vectors = aligned<T>(p.x, p.x_stride_s, p.x_stride_b) && aligned<T>(p.out, p.out_stride_s, p.out_stride_b) &&
                 aligned<float>(p.pe, p.pe_stride_s);
  auto* kernel = vectors ? sinusoidal_add_kernel<T, true> : sinusoidal_add_kernel<T, false>;
  device::launch("sinusoidal_add", device, stream, items, kernel, p, items);
}

// ---- rotary

// How the work is cut: an item is a group of kLanes pairs, or of as many elements to be copied, at one position of
// `heads` neighbouring heads (those of q, then those of k), which share what the thread reads of the tables.
struct RotaryWork {
  int64_t rotated_groups, groups, heads, chunks, items;
};

// One group of one row: pairs at [j, j + n), n <= kLanes.
template <class T, bool kInterleaved, bool kAligned>
LLMKERN_DEVICE void rotate_group(const T* x, T* out, const float* cos, const float* sin, int64_t half, int64_t j,
                                 int n) {
  constexpr int N = kLanes<T>;
  int64_t first = kInterleaved ? 2 * j : j, second = kInterleaved ? 2 * j + N : half + j;
  int n1 = kInterleaved ? at_most(2 * n, N) : n, n2 = kInterleaved ? 2 * n - n1 : n;
  float y[2 * N];
  read<kAligned, N>(x + first, y, n1);
  read<kAligned, N>(x + second, y + N, n2);
#pragma unroll
  for (int i = 0; i < N; i++) {
    float& left = y[kInterleaved ? 2 * i : i];
    float& right = y[kInterleaved ? 2 * i + 1 : N + i];
    float a = left, b = right;
    left = fmaf(a, cos[i], -(b * sin[i]));
    right = fmaf(a, sin[i], b * cos[i]);
  }
  write<kAligned, N>(out + first, y, n1);
  write<kAligned, N>(out + second, y + N, n2);
}

template <class T, bool kAligned>
LLMKERN_DEVICE void copy_group(const T* x, T* out, int64_t left) {
  if (kAligned && left >= kLanes<T>) {
    device::store16(out, device::load16(x));
    return;
  }
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++)
    if (i < left) out[i] = x[i];
}

template <class T, class Table, bool kInterleaved, bool kAligned>
LLMKERN_DEVICE void rotate_item(const RotaryParams& p, const RotaryWork& w, int64_t item) {
  constexpr int N = kLanes<T>;
  int64_t rest = divide(item, w.groups), group = item - rest * w.groups;
  int64_t chunk = divide(rest, p.length), s = rest - chunk * p.length;
  int64_t b = divide(chunk, w.chunks), h = (chunk - b * w.chunks) * w.heads;
  int64_t last = h + w.heads < p.heads + p.kv_heads ? h + w.heads : p.heads + p.kv_heads;
  int64_t half = p.rotated / 2, j = group * N, d = p.rotated + (group - w.rotated_groups) * N;
  int n = at_most(half - j, N);
  float cos[N], sin[N];
  if (group < w.rotated_groups) {
    int64_t row = s;
    if (p.positions) {
      int64_t at = b * p.position_stride_b + s * p.position_stride_s;
      row = p.position_dtype == DType::i32 ? static_cast<const int32_t*>(p.positions)[at]
                                           : static_cast<const int64_t*>(p.positions)[at];
    }
    if (row >= 0 && row < p.table_length) {
      read<kAligned, N>(static_cast<const Table*>(p.cos) + row * p.cos_stride + j, cos, n);
      read<kAligned, N>(static_cast<const Table*>(p.sin) + row * p.sin_stride + j, sin, n);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) cos[i] = sin[i] = device::bits_to_float(0x7fc00000u);
    }
#pragma unroll
    for (int i = 0; i < N; i++) sin[i] = p.inverse ? -sin[i] : sin[i];
  }
  for (; h < last; h++) {
    bool is_q = h < p.heads;
    const int64_t *stride = is_q ? p.q_stride : p.k_stride, *out_stride = is_q ? p.q_out_stride : p.k_out_stride;
    int64_t head = is_q ? h : h - p.heads;
    const T* x = static_cast<const T*>(is_q ? p.q : p.k) + b * stride[0] + head * stride[1] + s * stride[2];
    T* out = static_cast<T*>(is_q ? p.q_out : p.k_out) + b * out_stride[0] + head * out_stride[1] + s * out_stride[2];
    if (group < w.rotated_groups)
      rotate_group<T, kInterleaved, kAligned>(x, out, cos, sin, half, j, n);
    else
      copy_group<T, kAligned>(x + d, out + d, p.width - d);
  }
}

template <class T, class Table, bool kInterleaved, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const __grid_constant__ RotaryParams p, const __grid_constant__ RotaryWork w) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < w.items; i += int64_t{gridDim.x} * kThreads)
    rotate_item<T, Table, kInterleaved, kAligned>(p, w, i);
}

template <class T, class Table>
void rotary_typed(const RotaryParams& p, int device, void* stream) {
  constexpr int N = kLanes<T>;
  // Items of four heads read the tables a quarter as often; items of one spread a small call over more processors.
  constexpr int64_t kEnough = int64_t{1} << 17;
  int64_t all_heads = p.heads + p.kv_heads, half = p.rotated / 2;
  RotaryWork w = {};
  bool copies = p.q != p.q_out || p.k != p.k_out;
  w.rotated_groups = (half + N - 1) / N;
  w.groups = w.rotated_groups + (copies ? (p.width - p.rotated + N - 1) / N : 0);
  w.heads = p.batch * ((all_heads + 3) / 4) * p.length * w.groups >= kEnough ? 4 : 1;
  w.chunks = (all_heads + w.heads - 1) / w.heads;
  w.items = p.batch * w.chunks * p.length * w.groups;
  auto rows = [](const void* x, const int64_t* s) { return aligned<T>(x, s[0], s[1], s[2]); };
  bool vectors = half % N == 0 && rows(p.q, p.q_stride) && rows(p.q_out, p.q_out_stride) && rows(p.k, p.k_stride) &&
                 rows(p.k_out, p.k_out_stride) && aligned<Table>(p.cos, p.cos_stride) &&
                 aligned<Table>(p.sin, p.sin_stride);
  auto* kernel = p.interleaved
                     ? (vectors ? rotary_kernel<T, Table, true, true> : rotary_kernel<T, Table, true, false>)
                     : (vectors ? rotary_kernel<T, Table, false, true> : rotary_kernel<T, Table, false, false>);
  device::launch("rotary", device, stream, w.items, kernel, p, w);
}

}  // namespace

void sinusoidal_add_cuda(const SinusoidalAddParams& p, int device, void* stream) {
  switch (p.dtype) {
    case DType::bf16:
      return sinusoidal_add_typed<Bf16>(p, device, stream);
    case DType::f16:
      return sinusoidal_add_typed<Fp16>(p, device, stream);
    default:
      return sinusoidal_add_typed<float>(p, device, stream);
  }
}

void rotary_cuda(const RotaryParams& p, int device, void* stream) {
  bool wide = p.table_dtype == DType::f32;
  switch (p.dtype) {
    case DType::bf16:
      return wide ? rotary_typed<Bf16, float>(p, device, stream) : rotary_typed<Bf16, Bf16>(p, device, stream);
    case DType::f16:
      return wide ? rotary_typed<Fp16, float>(p, device, stream) : rotary_typed<Fp16, Fp16>(p, device, stream);
    default:
      return rotary_typed<float, float>(p, device, stream);
  }
}

}  // namespace llmkern
