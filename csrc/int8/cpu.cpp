// Linear with int8 weights and activations that are quantised as they come; compiled once per instruction set.
//
// quantize.h makes integers of rows, packed.h describes the weights, tile.h (amx_tile.h where there is AMX) multiplies,
// finish.h makes results of the sums. Every sum is exact (see llmkern/int8/compiled.py for the bound on k), so that no
// split of the work changes a result.
#include "amx_tile.h"
#include "tile.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kFewRows = 4;              // up to here the weights' way from memory is the cost
constexpr int64_t kBlockBytes = 384 << 10;   // quantised rows that stay in the second-level cache
constexpr int64_t kPanelsBytes = 512 << 10;  // packed weights that do, where rows pass through the panels
constexpr int64_t kChunkBytes = 8 << 20;     // quantised rows held at a time

constexpr int64_t kRowsBytes = 16 << 10;  // rows that are looked at together, in the first-level cache

// Rows [begin, end) of x, as integers in row_of(m). What is found of some is worked out together, since each takes a
// chain of instructions that wait for one another.
template <class T, class RowOf>
void quantize_some(const QuantizeParams& q, const T* x, int64_t stride, int64_t depth, int64_t begin, int64_t end,
                   const RowOf& row_of) {
  constexpr int kMost = 8;
  const int64_t fit = kRowsBytes / (depth * static_cast<int64_t>(sizeof(T)) + 1);
  const int64_t together = fit < 1 ? 1 : fit > kMost ? kMost : fit;
  for (int64_t first = begin; first < end; first += together) {
    const int64_t last = first + together < end ? first + together : end;
    Found found[kMost];
    for (int64_t m = first; m < last; m++) found[m - first] = look_at(q, x + m * stride, depth);
    for (int64_t m = first; m < last; m++) {
      const int64_t next = m + together < end ? m + together : m;
      put_row(q, x + m * stride, depth, found[m - first], row_of(m), x + next * stride);
    }
  }
}

template <class T, class RowOf>
void quantize(const QuantizeParams& q, const T* x, int64_t stride, int64_t depth, int64_t begin, int64_t end,
              const RowOf& row_of) {
  if (!q.group && q.rotate <= 1) return quantize_some(q, x, stride, depth, begin, end, row_of);
  for (int64_t m = begin; m < end; m++) {
    const QuantizedRow row = row_of(m);
    if (q.rotate <= 1) {
      quantize_groups(q, x + m * stride, depth, row);
      continue;
    }
    auto* turned = static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * depth + 64)));
    rotate_row(x + m * stride, depth, q.rotate, turned);
    if (q.group)
      quantize_groups(q, turned, depth, row);
    else
      put_row(q, turned, depth, look_at(q, turned, depth), row, turned);
  }
}

bool two_digits(const QuantizeParams& q) { return q.outliers || q.scaling == Scaling::wide; }

// A chunk of quantised rows in one block of memory.
struct Rows {
  Low* low;
  High* high;
  uint64_t* bits;
  float* scales;
  int32_t *zeros, *high_sums;
  int64_t stride, words, scales_of_row;

  Rows(Scratch slot, const QuantizeParams& q, int64_t rows, int64_t depth)
      : high(nullptr), bits(nullptr), high_sums(nullptr), stride(row_stride(depth)) {
    words = (depth + kBitsOfWord - 1) / kBitsOfWord;
    scales_of_row = q.group ? (depth + q.group - 1) / q.group : 1;
    int64_t low_bytes = rows * stride * static_cast<int64_t>(sizeof(Low));
    int64_t high_bytes = two_digits(q) ? rows * stride * static_cast<int64_t>(sizeof(High)) : 0;
    int64_t bytes = low_bytes + high_bytes + rows * (8 * words + 8 * scales_of_row + 4) + 256;
    char* memory = static_cast<char*>(scratch(slot, static_cast<size_t>(bytes)));
    low = reinterpret_cast<Low*>(memory);
    memory += low_bytes;
    if (two_digits(q)) {
      high = reinterpret_cast<High*>(memory);
      bits = reinterpret_cast<uint64_t*>(memory + high_bytes);
      memory += high_bytes + rows * words * 8;
    }
    scales = reinterpret_cast<float*>(memory);
    zeros = reinterpret_cast<int32_t*>(scales + rows * scales_of_row);
    high_sums = zeros + rows * scales_of_row;
  }
  // Whole vectors are stored, and rows at a multiple of 4096 bytes would share a few sets of the cache.
  static int64_t row_stride(int64_t depth) {
    constexpr int64_t kElement = sizeof(Low);
    int64_t stride = (depth + kDepthGrain - 1) / kDepthGrain * kDepthGrain;
    return stride * kElement % 4096 == 0 ? stride + 64 / kElement : stride;
  }
  QuantizedRow row(int64_t m) const {
    return {low + m * stride,           high ? high + m * stride : nullptr, bits ? bits + m * words : nullptr,
            scales + m * scales_of_row, zeros + m * scales_of_row,          high_sums + m};
  }
};

const float* widened_bias(const Int8LinearParams& p) {
  if (!p.bias || p.bias_dtype == DType::f32) return static_cast<const float*>(p.bias);
  auto* wide = static_cast<float*>(scratch(Scratch::work, static_cast<size_t>(4 * p.outputs)));
  for (int64_t n = 0; n < p.outputs; n++)
    wide[n] = p.bias_dtype == DType::bf16 ? load_one(static_cast<const Bf16*>(p.bias) + n)
                                          : load_one(static_cast<const Fp16*>(p.bias) + n);
  return wide;
}

template <class T>
void multiply_rows(const Work& w, Kind kind, int64_t begin, int64_t end, int64_t panel) {
  if (kind == Kind::grouped) return tiles<T, Kind::grouped>(w, begin, end, panel);
  if (kind == Kind::wide) return tiles<T, Kind::wide>(w, begin, end, panel);
  tiles<T, Kind::plain>(w, begin, end, panel);
}

bool in_tiles(const Layout& layout, Kind kind, int64_t rows) {
  return kTiled && rows > kFewRows && layout.depth > 0 && (kind != Kind::grouped || layout.group % kTileDepth == 0);
}

// How the products of a chunk are cut into tasks: `blocks` blocks of `rows` rows, for each `panels` panels.
struct Cut {
  bool tiles;
  int64_t rows, blocks, panels, tasks;
};
Cut cut_for(const Layout& layout, int64_t rows, int64_t row_bytes, int threads, bool tiles) {
  Cut cut{tiles, 0, 0, 1, 0};
  if (tiles) {  // few rows and many panels: the rows stay in the first-level cache, the panels in the second
    const int64_t most = kPanelsBytes / layout.panel_bytes, each = (layout.panels + threads - 1) / threads;
    cut.panels = most < each ? most : each;
    cut.panels = cut.panels < 1 ? 1 : cut.panels;
    cut.rows = kBlockRows;
  } else {
    int64_t most = kBlockBytes / (row_bytes + 1) / kBlockRows * kBlockRows;
    most = most < 8 * kBlockRows ? 8 * kBlockRows : most > 384 ? 384 : most;
    const int64_t blocks = (rows + most - 1) / most;
    cut.rows = ((rows + blocks - 1) / blocks + kBlockRows - 1) / kBlockRows * kBlockRows;
  }
  cut.blocks = (rows + cut.rows - 1) / cut.rows;
  cut.tasks = cut.blocks * ((layout.panels + cut.panels - 1) / cut.panels);
  return cut;
}

template <class T>
void linear(const Int8LinearParams& p, const Layout& layout) {
  const char* packed = static_cast<const char*>(p.packed);
  const float* bias = widened_bias(p);
  const QuantizeParams& q = p.quantize;
  const Kind kind = q.group ? Kind::grouped : q.scaling == Scaling::wide ? Kind::wide : Kind::plain;
  int64_t row_bytes = Rows::row_stride(p.depth) * static_cast<int64_t>(sizeof(Low)) * (two_digits(q) ? 2 : 1);
  int64_t most = kChunkBytes / (row_bytes + 1);
  most = most < 384 ? 384 : most;
  int64_t chunk = p.rows < most ? p.rows : most;
  Rows quantized(Scratch::quantized, q, (chunk + 31) / 32 * 32, p.depth);
  for (int64_t first = 0; first < p.rows; first += chunk) {
    int64_t rows = p.rows - first < chunk ? p.rows - first : chunk;
    const T* x = static_cast<const T*>(p.x) + first * p.x_stride;
    auto rows_of_thread = [&](int thread, int threads) {
      auto part = share(rows, 1, thread, threads);
      quantize(q, x, p.x_stride, p.depth, part.begin, part.end, [&](int64_t m) { return quantized.row(m); });
    };
    // Waking the other threads costs as much as quantising this many elements here.
    parallel(rows * p.depth < 32768 ? 1 : p.threads, rows_of_thread);

    Work w;
    w.layout = &layout;
    w.low = quantized.low, w.high = quantized.high, w.bits = quantized.bits;
    w.scales = quantized.scales, w.zeros = quantized.zeros, w.high_sums = quantized.high_sums;
    w.weights = reinterpret_cast<const int8_t*>(packed + layout.weights());
    w.weight_sums = reinterpret_cast<const int32_t*>(packed + Layout::kHeaderBytes);
    w.weight_scale = p.weight_scale, w.bias = bias;
    w.residual = p.residual
                     ? reinterpret_cast<const char*>(static_cast<const T*>(p.residual) + first * p.residual_stride)
                     : nullptr;
    w.out = reinterpret_cast<char*>(static_cast<T*>(p.out) + first * p.out_stride);
    w.stride = quantized.stride, w.words = quantized.words;
    w.residual_stride = p.residual_stride, w.out_stride = p.out_stride;
    w.activation = p.activation, w.grouped = q.group != 0, w.symmetric = q.scaling == Scaling::symmetric;
    w.simple = p.activation == Activation::none && !p.residual;

    const Cut cut = cut_for(layout, rows, row_bytes, p.threads, in_tiles(layout, kind, rows));
    Counter counter;
    auto multiply = [&](int thread, int threads) {
      if (rows <= kFewRows) {  // always the same panels on the same thread, in whose cache they may still be
        auto part = share(layout.panels, 1, thread, threads);
        for (int64_t panel = part.begin; panel < part.end; panel++) multiply_rows<T>(w, kind, 0, rows, panel);
        return;
      }
      auto each = [&](const auto& body) {
        for (int64_t task = counter.take(); task < cut.tasks; task = counter.take()) {
          const int64_t begin = task % cut.blocks * cut.rows, first = task / cut.blocks * cut.panels;
          body(begin, begin + cut.rows < rows ? begin + cut.rows : rows, first,
               first + cut.panels < layout.panels ? first + cut.panels : layout.panels);
        }
      };
#ifdef LLMKERN_TILES
      if (cut.tiles) {
        Tiles registers;
        if (kind == Kind::grouped) return Blocks<T, true>(w).all(each);
        return Blocks<T, false>(w).all(each);
      }
#endif
      each([&](int64_t begin, int64_t end, int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel++) multiply_rows<T>(w, kind, begin, end, panel);
      });
    };
    parallel(rows * p.depth * p.outputs < 131072 ? 1 : p.threads, multiply);
  }
}

}  // namespace

void int8_pack(const Int8PackParams& p) {
  Layout layout(p.outputs, p.depth, p.group, p.pairs);
  *p.bytes = layout.bytes();
  if (!p.packed) return;
  Header header = layout.header();
  std::memcpy(p.packed, &header, sizeof header);
  auto body = [&](int thread, int threads) {
    auto part = share(layout.panels, 1, thread, threads);
    for (int64_t panel = part.begin; panel < part.end; panel++) pack_panel(p, layout, panel);
  };
  parallel(p.outputs * p.depth < 65536 ? 1 : p.threads, body);
}

void int8_linear(const Int8LinearParams& p) {
  Layout layout(p.outputs, p.depth, p.quantize.group, takes_pairs(p.activation));
  Header header = layout.header();
  *p.accepted = std::memcmp(p.packed, &header, sizeof header) == 0;
  if (!*p.accepted || p.rows == 0 || p.outputs == 0) return;
  switch (p.dtype) {
    case DType::bf16:
      return linear<Bf16>(p, layout);
    case DType::f16:
      return linear<Fp16>(p, layout);
    default:
      return linear<float>(p, layout);
  }
}

void quantize_rows(const QuantizeRowsParams& p) {
  Rows one(Scratch::quantized, p.quantize, 1, p.depth);
  QuantizedRow row = one.row(0);
  for (int64_t m = 0; m < p.rows; m++) {
    row.scale = p.scale + m * one.scales_of_row;
    auto row_of = [&](int64_t) { return row; };
    switch (p.dtype) {
      case DType::bf16:
        quantize(p.quantize, static_cast<const Bf16*>(p.x), p.x_stride, p.depth, m, m + 1, row_of);
        break;
      case DType::f16:
        quantize(p.quantize, static_cast<const Fp16*>(p.x), p.x_stride, p.depth, m, m + 1, row_of);
        break;
      default:
        quantize(p.quantize, static_cast<const float*>(p.x), p.x_stride, p.depth, m, m + 1, row_of);
    }
    for (int64_t g = 0; g < one.scales_of_row; g++) p.zero[m * one.scales_of_row + g] = row.zero[g] + kLowOffset;
    for (int64_t k = 0; k < p.depth; k++)
      p.integer[m * p.depth + k] = row.low[k] + kLowOffset + (row.high ? 256 * row.high[k] : 0);
  }
}

}  // namespace llmkern::LLMKERN_ISA
