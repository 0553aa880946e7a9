// Linear with int8 weights and activations quantised row by row; compiled once per instruction set.
//
// Packed weights: a header, the sum of each output's weights, and panels of kPanel outputs. A panel holds, for each
// kDotDepth values of k, the weights of its outputs one after another, so that a step of the tile below reads one
// run of memory. What lies beyond the last output or the last k is zero.
//
// A tile multiplies up to kRows rows with a panel in registers over the whole of k, and turns the integer sums into
// results before they leave the registers. Every sum is exact (see llmkern/int8/compiled.py for the bound on k), so
// that no split of the work changes a result.
#include <cmath>
#include <cstring>

#include "../common/parallel.h"
#include "../common/simd.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kVectors = kRegisters >= 32 ? 4 : 2;
constexpr int kRows = 6;  // 6 x kVectors sums, kVectors weights and an activation fill the registers
constexpr int kPanel = kVectors * kWidth;
constexpr int64_t kFewRows = 4;             // up to here the weights' way from memory is the cost
constexpr int64_t kBlockBytes = 384 << 10;  // quantised rows that stay in the second-level cache
constexpr int64_t kChunkBytes = 8 << 20;    // quantised rows held at a time

struct Header {
  int64_t layout, outputs, depth;
};
constexpr int64_t kHeaderBytes = 64;
constexpr int64_t kLayout = 0x1a70000 + kPanel * 16 + kDotDepth;

struct Layout {
  int64_t panels, steps, panel_bytes, sums_bytes;
  Layout(int64_t outputs, int64_t depth)
      : panels((outputs + kPanel - 1) / kPanel),
        steps((depth + kDotDepth - 1) / kDotDepth),
        panel_bytes(steps * kDotDepth * kPanel),
        sums_bytes((panels * kPanel * 4 + 63) / 64 * 64) {}
  int64_t weights() const { return kHeaderBytes + sums_bytes; }
  int64_t bytes() const { return weights() + panels * panel_bytes; }
};

void pack_panel(const Int8PackParams& p, const Layout& layout, int64_t panel) {
  char* base = static_cast<char*>(p.packed);
  int8_t* to = reinterpret_cast<int8_t*>(base + layout.weights() + panel * layout.panel_bytes);
  int32_t* sums = reinterpret_cast<int32_t*>(base + kHeaderBytes) + panel * kPanel;
  for (int column = 0; column < kPanel; column++) {
    int64_t n = panel * kPanel + column, inside = n < p.outputs ? p.depth : 0;
    const int8_t* from = p.weight + n * p.depth;
    int32_t sum = 0;
    for (int64_t k = 0; k < inside; k++) sum += from[k];
    sums[column] = sum;
    int8_t* out = to + column * kDotDepth;
    for (int64_t step = 0; step < layout.steps; step++, out += kPanel * kDotDepth)
      for (int i = 0; i < kDotDepth; i++)
        out[i] = step * kDotDepth + i < inside ? from[step * kDotDepth + i] : int8_t{0};
  }
}

// Writes the row up to the next multiple of 64 elements; what is beyond `depth` meets weights of zero.
template <class T>
void quantize_row(const T* x, int64_t depth, Quantized* out, float* row_scale, int32_t* row_zero) {
  Float lo = zero(), hi = zero(), broken = zero();
  auto look = [&](Float a) {
    lo = min(a, lo);
    hi = max(a, hi);
    broken = fma(a, zero(), broken);  // NaN from the first NaN or infinity on
  };
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) look(load(x + k));
  int rest = static_cast<int>(depth - k);
  if (rest) look(load_first(x + k, rest));
  float least = -largest(sub(zero(), lo)), scale = (largest(hi) - least) / 255.0f;
  if (scale < 0x1p-126f) scale = 1.0f;  // it would have no inverse
  if (scale > 0x1.fffffep127f) scale = __builtin_nanf("");
  float inverse = 1.0f / scale, shift = std::nearbyintf(-least * inverse);
  int32_t origin = shift >= 255.0f ? 255 : shift >= 0.0f ? static_cast<int32_t>(shift) : 0;
  *row_scale = scale + sum(broken);  // NaN here is all that makes such a row NaN
  *row_zero = origin;
  Float factor = broadcast(inverse);
  Int offset = broadcast_int(origin);
  auto quantized = [&](Float a) { return add(round_to_int(mul(a, factor)), offset); };
  for (k = 0; k + kWidth <= depth; k += kWidth) store_quantized(out + k, quantized(load(x + k)));
  if (rest) store_quantized(out + k, quantized(load_first(x + k, rest)));
}

template <class T>
void quantize_some(const void* x, int64_t stride, int64_t depth, int64_t begin, int64_t end, Quantized* out,
                   int64_t out_stride, float* scales, int32_t* zeros) {
  for (int64_t m = begin; m < end; m++)
    quantize_row(static_cast<const T*>(x) + m * stride, depth, out + m * out_stride, scales + m, zeros + m);
}

struct Work {
  const Quantized* x;
  const float* scales;
  const int32_t* zeros;
  const int8_t* weights;
  const int32_t* sums;
  const float* weight_scale;
  const float* bias;
  char* out;
  int64_t x_stride, out_stride, outputs, steps, panel_bytes;
};

template <class T, int Rows, bool Prefetch>
void tile(const Work& w, int64_t row, int64_t panel) {
  Int sums[Rows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) sums[i][j] = broadcast_int(0);
  const Quantized* x = w.x + row * w.x_stride;
  const int8_t* weight = w.weights + panel * w.panel_bytes;
  for (int64_t step = 0; step < w.steps; step++, weight += kPanel * kDotDepth, x += kDotDepth) {
    Int vector[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) vector[j] = load_weights(weight + j * kWidth * kDotDepth);
    if (Prefetch) {
#pragma GCC unroll 8
      for (int b = 0; b < kPanel * kDotDepth; b += 64) __builtin_prefetch(weight + 4096 + b);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) {
      Int activation = broadcast_quantized(x + i * w.x_stride);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++) sums[i][j] = dot_quantized(sums[i][j], activation, vector[j]);
    }
  }
  int64_t column = panel * kPanel;
  T* out = reinterpret_cast<T*>(w.out) + row * w.out_stride + column;
  Float scale[Rows];
  Int origin[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i++) {
    scale[i] = broadcast(w.scales[row + i]);
    origin[i] = broadcast_int(w.zeros[row + i]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j++) {
    int64_t left = w.outputs - column - j * kWidth;
    if (left <= 0) break;
    bool whole = left >= kWidth;
    int n = static_cast<int>(left);
    const float* at = w.weight_scale + column + j * kWidth;
    Float weight_scale = whole ? load(at) : load_first(at, n), bias = zero();
    if (w.bias) bias = whole ? load(w.bias + column + j * kWidth) : load_first(w.bias + column + j * kWidth, n);
    Int total;
    std::memcpy(&total, w.sums + column + j * kWidth, sizeof total);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) {
      Float y = mul(to_float(sub(sums[i][j], mul(total, origin[i]))), mul(scale[i], weight_scale));
      if (w.bias) y = add(y, bias);  // not with the product in one rounding: the reference rounds twice
      T* to = out + i * w.out_stride + j * kWidth;
      if (whole)
        store(to, y);
      else
        store_first(to, y, n);
    }
  }
}

template <class T>
void tiles(const Work& w, int64_t begin, int64_t end, int64_t panel) {
  for (int64_t row = begin; row < end;) {
    int64_t left = end - row, rows = left >= 12 || left == kRows ? kRows : left > kRows ? (left + 1) / 2 : left;
    switch (rows) {
      case 6:
        tile<T, 6, false>(w, row, panel);
        break;
      case 5:
        tile<T, 5, false>(w, row, panel);
        break;
      case 4:
        tile<T, 4, true>(w, row, panel);
        break;
      case 3:
        tile<T, 3, true>(w, row, panel);
        break;
      case 2:
        tile<T, 2, true>(w, row, panel);
        break;
      default:
        tile<T, 1, true>(w, row, panel);
    }
    row += rows;
  }
}

template <class T>
void linear(const Int8LinearParams& p) {
  Layout layout(p.outputs, p.depth);
  const char* packed = static_cast<const char*>(p.packed);
  // Whole vectors are stored, and rows at a multiple of 4096 bytes would share a few sets of the cache.
  int64_t stride = (p.depth + 63) / 64 * 64, element = static_cast<int64_t>(sizeof(Quantized));
  if (stride * element % 4096 == 0) stride += 64 / element;
  int64_t most = kChunkBytes / (stride * element + 1);
  most = most < 384 ? 384 : most;
  int64_t chunk = p.rows < most ? p.rows : most;
  int64_t rows_bytes = (chunk * stride * element + 63) / 64 * 64;
  char* memory = static_cast<char*>(scratch(Scratch::quantized, static_cast<size_t>(rows_bytes + 8 * chunk + 64)));
  auto* quantized = reinterpret_cast<Quantized*>(memory);
  auto* scales = reinterpret_cast<float*>(memory + rows_bytes);
  auto* zeros = reinterpret_cast<int32_t*>(scales + chunk);
  const float* bias = static_cast<const float*>(p.bias);
  if (p.bias && p.bias_dtype != DType::f32) {
    auto* wide = static_cast<float*>(scratch(Scratch::work, static_cast<size_t>(4 * p.outputs)));
    for (int64_t n = 0; n < p.outputs; n++)
      wide[n] = p.bias_dtype == DType::bf16 ? load_one(static_cast<const Bf16*>(p.bias) + n)
                                            : load_one(static_cast<const Fp16*>(p.bias) + n);
    bias = wide;
  }
  Work w{quantized,
         scales,
         zeros,
         reinterpret_cast<const int8_t*>(packed + layout.weights()),
         reinterpret_cast<const int32_t*>(packed + kHeaderBytes),
         p.weight_scale,
         bias,
         nullptr,
         stride,
         p.out_stride,
         p.outputs,
         layout.steps,
         layout.panel_bytes};
  for (int64_t first = 0; first < p.rows; first += chunk) {
    int64_t rows = p.rows - first < chunk ? p.rows - first : chunk;
    const T* x = static_cast<const T*>(p.x) + first * p.x_stride;
    w.out = reinterpret_cast<char*>(static_cast<T*>(p.out) + first * p.out_stride);
    auto quantize = [&](int thread, int threads) {
      Range part = share(rows, 1, thread, threads);
      quantize_some<T>(x, p.x_stride, p.depth, part.begin, part.end, quantized, stride, scales, zeros);
    };
    // Waking the other threads costs as much as quantising this many elements here.
    parallel(rows * p.depth < 32768 ? 1 : p.threads, quantize);

    int64_t block = kBlockBytes / (stride * element + 1) / kRows * kRows;
    block = block < 48 ? 48 : block > 384 ? 384 : block;
    int64_t blocks = (rows + block - 1) / block;
    block = ((rows + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
    blocks = (rows + block - 1) / block;
    Counter counter;
    auto multiply = [&](int thread, int threads) {
      if (rows <= kFewRows) {  // always the same panels on the same thread, in whose cache they may still be
        Range part = share(layout.panels, 1, thread, threads);
        for (int64_t panel = part.begin; panel < part.end; panel++) tiles<T>(w, 0, rows, panel);
        return;
      }
      for (int64_t task = counter.take(); task < layout.panels * blocks; task = counter.take()) {
        int64_t begin = task / layout.panels * block, end = begin + block;
        tiles<T>(w, begin, end < rows ? end : rows, task % layout.panels);
      }
    };
    parallel(rows * p.depth * p.outputs < 131072 ? 1 : p.threads, multiply);
  }
}

}  // namespace

void int8_pack(const Int8PackParams& p) {
  Layout layout(p.outputs, p.depth);
  *p.bytes = layout.bytes();
  if (!p.packed) return;
  Header header{kLayout, p.outputs, p.depth};
  std::memcpy(p.packed, &header, sizeof header);
  auto body = [&](int thread, int threads) {
    Range part = share(layout.panels, 1, thread, threads);
    for (int64_t panel = part.begin; panel < part.end; panel++) pack_panel(p, layout, panel);
  };
  parallel(p.outputs * p.depth < 65536 ? 1 : p.threads, body);
}

void int8_linear(const Int8LinearParams& p) {
  Header header;
  std::memcpy(&header, p.packed, sizeof header);
  *p.accepted = header.layout == kLayout && header.outputs == p.outputs && header.depth == p.depth;
  if (!*p.accepted || p.rows == 0 || p.outputs == 0) return;
  switch (p.dtype) {
    case DType::bf16:
      return linear<Bf16>(p);
    case DType::f16:
      return linear<Fp16>(p);
    default:
      return linear<float>(p);
  }
}

void quantize_rows(const QuantizeRowsParams& p) {
  auto* row =
      static_cast<Quantized*>(scratch(Scratch::quantized, static_cast<size_t>(p.depth + 64) * sizeof(Quantized)));
  for (int64_t m = 0; m < p.rows; m++) {
    switch (p.dtype) {
      case DType::bf16:
        quantize_row(static_cast<const Bf16*>(p.x) + m * p.x_stride, p.depth, row, p.scale + m, p.zero + m);
        break;
      case DType::f16:
        quantize_row(static_cast<const Fp16*>(p.x) + m * p.x_stride, p.depth, row, p.scale + m, p.zero + m);
        break;
      default:
        quantize_row(static_cast<const float*>(p.x) + m * p.x_stride, p.depth, row, p.scale + m, p.zero + m);
    }
    for (int64_t k = 0; k < p.depth; k++) p.quantized[m * p.depth + k] = static_cast<uint8_t>(row[k]);
  }
}

}  // namespace llmkern::LLMKERN_ISA
