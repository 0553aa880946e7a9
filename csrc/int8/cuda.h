// The CUDA launchers of int8_linear. Each returns when its kernels are queued on `stream` (a cudaStream_t) of `device`,
// and throws std::runtime_error where a launch fails. Nothing is allocated: the digits of the activations lie in memory
// that the caller gives.
#pragma once
#include <cstddef>

#include "cuda_sm90.h"
#include "params.h"

namespace llmkern {

// How the integers of a call are made of bytes.
enum class Digits : int32_t {
  one = 0,     // u, unsigned
  two = 1,     // the low one unsigned, the high one signed, and there only where `bits` says so
  groups = 2,  // u - 128, signed, with scales for groups of k
};
inline Digits digits_of(const QuantizeParams& q) {
  if (q.group) return Digits::groups;
  return q.outliers || q.scaling == Scaling::wide ? Digits::two : Digits::one;
}

constexpr int kDigitPiece = 16;  // values of k that a bit of `bits` is about, and that a thread reads at once
constexpr int kDigitsOfWord = 32 * kDigitPiece;
constexpr int kMostWords = 160;  // of `bits`, for 2^16 and more values of k: MOST_DEPTH in llmkern/int8/compiled.py

// The rows of activations as integers: what the first kernel writes and the second reads. Pieces of kDigitPiece digits
// are aligned to 16 bytes; in the last piece of a row, those behind k = depth stand for x = 0.
struct Int8Digits {
  Digits kind;
  uint8_t* low;    // (rows, stride)
  int8_t* high;    // (rows, stride): pieces whose bit is set; the others are not written and stand for zeros
  uint32_t* bits;  // (rows, words): for each piece whether a high digit is there
  float* scale;    // (rows, groups); NaN for a row or group with NaN or infinity
  int32_t* zero;   // (rows)
  int64_t stride, words, groups;
};

// `linear.packed` and `threads` are not used. Scales of the weight lie weight_scale_stride apart by outputs and by
// groups. The weight's rows are 16-byte aligned, weight_stride apart, and zeros
// behind k = depth up to the next multiple of 16. weight_sums: (outputs), sums over k; not read where there are groups.
struct Int8CudaParams {
  Int8LinearParams linear;
  const int8_t* weight;
  int64_t weight_stride;
  const int32_t* weight_sums;
  int64_t weight_scale_stride[2];
  Int8Digits digits;
  bool pairs;        // takes_pairs(linear.activation)
  bool sm90;         // by int8_tiles_sm90, where there are tiles
  int tile_rows;     // of int8_tiles_cuda: 64, 128 (not with groups), or 0 for a choice
  int tile_columns;  // of int8_tiles_sm90: 128, 192 (two digits), 256 (one), or 0 for a choice
};

// Places the digits of a call in `workspace`, which is aligned to 16 bytes; returns how much of it they take.
inline int64_t place_digits(const Int8LinearParams& p, void* workspace, Int8Digits& d) {
  auto multiple = [](int64_t n, int64_t of) { return (n + of - 1) / of * of; };
  d.kind = digits_of(p.quantize);
  const bool two = d.kind == Digits::two;
  char* at = static_cast<char*>(workspace);
  int64_t used = 0;
  auto take = [&](int64_t bytes) {
    char* here = at + used;
    used += multiple(bytes, 16);
    return here;
  };
  d.stride = multiple(p.depth, kDigitPiece);
  d.words = multiple(p.depth, kDigitsOfWord) / kDigitsOfWord;
  d.groups = p.quantize.group ? multiple(p.depth, p.quantize.group) / p.quantize.group : 1;
  d.low = reinterpret_cast<uint8_t*>(take(p.rows * d.stride));
  d.high = two ? reinterpret_cast<int8_t*>(take(p.rows * d.stride)) : nullptr;
  d.bits = two ? reinterpret_cast<uint32_t*>(take(p.rows * d.words * 4)) : nullptr;
  d.scale = reinterpret_cast<float*>(take(p.rows * d.groups * 4));
  d.zero = reinterpret_cast<int32_t*>(take(p.rows * 4));
  return used;
}

// The most bytes that a row of x may take, which a block keeps in shared memory.
constexpr int64_t kMostRowBytes = 96 * 1024;
// Up to so many rows each weight is read once by the threads that multiply it; above, tiles are multiplied.
constexpr int64_t kFewRows = 8;

void int8_quantize_cuda(const Int8CudaParams& p, int device, void* stream);
void int8_few_rows_cuda(const Int8CudaParams& p, int device, void* stream);
void int8_tiles_cuda(const Int8CudaParams& p, int device, void* stream);

// All of int8_linear: the digits, then the products.
inline void int8_linear_cuda(const Int8CudaParams& p, int device, void* stream) {
  if (p.linear.rows == 0 || p.linear.outputs == 0) return;
  int8_quantize_cuda(p, device, stream);
  const auto products = p.linear.rows <= kFewRows ? int8_few_rows_cuda : p.sm90 ? int8_tiles_sm90 : int8_tiles_cuda;
  products(p, device, stream);
}

}  // namespace llmkern
