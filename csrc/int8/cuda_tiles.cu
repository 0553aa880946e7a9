// Products of many rows of activations with an int8 weight by mma.sync m16n8k32, on CUDA.
//
// A block of eight warps makes a tile of kTileRows x 128 results. Tiles of 64 values of k come by cp.async into
// several stages of shared memory, and from there by ldmatrix into the fragments of 2 x 4 warps. High digits are copied
// and multiplied for the values of k where a row of the tile has one, into sums of their own. With groups, what the
// sums of a group stand for is added in float32 at the group's end, in the order of the groups.
#include "../common/launch.cuh"
#include "../common/mma_int8.cuh"
#include "cuda_finish.cuh"

namespace llmkern::int8 {

constexpr int kBlock = 256;  // threads
constexpr int kTileColumns = 128, kTileDepth = 64;
constexpr int kMultiplyDepth = 32;  // of k that one instruction takes
constexpr int kWarpRows = 2, kWarpColumns = 4;
constexpr int kColumns = kTileColumns / kWarpColumns, kColumnFragments = kColumns / 8;  // of a warp
constexpr int kPieces = kTileDepth / kDigitPiece;                                       // of a row of a tile

// A row of a tile is 64 bytes, and two neighbouring ones are a row of 128 bytes for the swizzle.
LLMKERN_DEVICE uint32_t place(int row, int piece) { return device::swizzle<128>(row / 2, row % 2 * kPieces + piece); }

template <int kTileRows, Digits kDigits>
struct Tile {
  static constexpr bool kTwo = kDigits == Digits::two;
  static constexpr int kStages = kTwo ? 3 : 4;
  static constexpr int kLow = 0, kWeight = kTileRows * kTileDepth, kHigh = kWeight + kTileColumns * kTileDepth;
  static constexpr int kStageBytes = kHigh + (kTwo ? kTileRows * kTileDepth : 0);
  static constexpr int kShared = kStages * kStageBytes;
  static constexpr int kRows = kTileRows / kWarpRows, kRowFragments = kRows / 16;  // of a warp
};

// Where a warp's fragments begin in the tile, and this block's first row and column.
struct Position {
  int64_t row, column;
  int lane, warp_row, warp_column;
};

// The output that column c of a tile is; of pairs, a warp has 16 first ones and then their seconds. -1: none.
LLMKERN_DEVICE int64_t output_of(const Int8CudaParams& p, int64_t tile, int c) {
  const int64_t outputs = p.linear.outputs;
  if (!p.pairs) {
    const int64_t n = tile * kTileColumns + c;
    return n < outputs ? n : -1;
  }
  const int64_t n = tile * (kTileColumns / 2) + c / kColumns * (kColumns / 2) + c % (kColumns / 2);
  if (n >= outputs / 2) return -1;
  return c % kColumns < kColumns / 2 ? n : n + outputs / 2;
}

// Copies the pieces of a tile of 64 values of k from `first` on; those outside of the matrix become zeros.
template <class T, int kTileRows>
LLMKERN_DEVICE void copy_activations(const Int8CudaParams& p, int64_t row, int first, uint32_t to) {
#pragma unroll
  for (int i = threadIdx.x; i < kTileRows * kPieces; i += kBlock) {
    const int r = i / kPieces, piece = i % kPieces, k = first + piece * kDigitPiece;
    const bool inside = row + r < p.linear.rows && k < p.linear.depth;
    const int64_t from = inside ? (row + r) * p.digits.stride + k : 0;
    device::copy16_async(to + T::kLow + place(r, piece), p.digits.low + from, inside ? 16 : 0);
  }
}
template <class T, int kTileRows>
LLMKERN_DEVICE void copy_high_digits(const Int8CudaParams& p, int64_t row, int first, uint32_t to) {
#pragma unroll
  for (int i = threadIdx.x; i < kTileRows * kPieces; i += kBlock) {
    const int r = i / kPieces, piece = i % kPieces, k = first + piece * kDigitPiece;
    bool there = row + r < p.linear.rows && k < p.linear.depth;
    if (there) there = p.digits.bits[(row + r) * p.digits.words + k / kDigitsOfWord] >> (k / kDigitPiece % 32) & 1;
    const int64_t from = there ? (row + r) * p.digits.stride + k : 0;
    device::copy16_async(to + T::kHigh + place(r, piece), p.digits.high + from, there ? 16 : 0);
  }
}
template <class T>
LLMKERN_DEVICE void copy_weights(const Int8CudaParams& p, const int64_t* outputs, int first, uint32_t to) {
#pragma unroll
  for (int i = 0; i < kTileColumns * kPieces / kBlock; i++) {
    const int c = threadIdx.x / kPieces + i * (kBlock / kPieces), piece = threadIdx.x % kPieces;
    const int k = first + piece * kDigitPiece;
    const bool inside = outputs[i] >= 0 && k < p.linear.depth;
    const int64_t from = inside ? outputs[i] * p.weight_stride + k : 0;
    device::copy16_async(to + T::kWeight + place(c, piece), p.weight + from, inside ? 16 : 0);
  }
}

// The fragments of an operand of rows [first, first + 16 * kCount) for kMultiplyDepth of k from piece `piece` on.
template <int kCount>
LLMKERN_DEVICE void load_rows(uint32_t from, int first, int piece, int lane, uint32_t (*x)[4]) {
#pragma unroll
  for (int i = 0; i < kCount; i++)
    device::load_matrices(x[i], from + place(first + i * 16 + lane % 16, piece + lane / 16));
}
// The same of columns, each 16 of which are two fragments: (k 0 to 15, 16 to 31) of the first 8, then of the others.
LLMKERN_DEVICE void load_columns(uint32_t from, int first, int piece, int lane, uint32_t (*w)[4]) {
#pragma unroll
  for (int j = 0; j < kColumnFragments / 2; j++)
    device::load_matrices(w[j], from + place(first + j * 16 + lane / 16 * 8 + lane % 8, piece + lane / 8 % 2));
}
template <bool kSigned, int kCount>
LLMKERN_DEVICE void multiply(const uint32_t (*x)[4], const uint32_t (*w)[4], int32_t (*sums)[kColumnFragments][4]) {
#pragma unroll
  for (int i = 0; i < kCount; i++)
#pragma unroll
    for (int j = 0; j < kColumnFragments; j++)
      device::multiply_bytes<kSigned>(sums[i][j], x[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
}

// totals += the sums of a group, in units of what they stand for, and the sums become 0.
template <int kCount>
LLMKERN_DEVICE void add_group(const Int8CudaParams& p, const Position& at, int64_t group,
                              int32_t (*sums)[kColumnFragments][4], float (*totals)[kColumnFragments][4]) {
  float weight_scale[kColumnFragments][2];
#pragma unroll
  for (int j = 0; j < kColumnFragments; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int64_t n = output_of(p, at.column, at.warp_column + j * 8 + at.lane % 4 * 2 + e);
      weight_scale[j][e] =
          n < 0 ? 0.0f : p.linear.weight_scale[n * p.weight_scale_stride[0] + group * p.weight_scale_stride[1]];
    }
#pragma unroll
  for (int i = 0; i < kCount; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t m = at.row + at.warp_row + i * 16 + half * 8 + at.lane / 4;
      const float scale = m < p.linear.rows ? p.digits.scale[m * p.digits.groups + group] : 0.0f;
#pragma unroll
      for (int j = 0; j < kColumnFragments; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int32_t& sum = sums[i][j][half * 2 + e];
          const float part = __fmul_rn(static_cast<float>(sum), __fmul_rn(scale, weight_scale[j][e]));
          totals[i][j][half * 2 + e] = __fadd_rn(totals[i][j][half * 2 + e], part);
          sum = 0;
        }
    }
}

// Results of this warp's fragments.
template <Digits kDigits, int kCount>
LLMKERN_DEVICE void finish_tile(const Int8CudaParams& p, const Position& at, const int32_t (*low)[kColumnFragments][4],
                                const int32_t (*high)[kColumnFragments][4],
                                const float (*totals)[kColumnFragments][4]) {
  const Int8LinearParams& l = p.linear;
  // Two results lie in one word where rows are even: the columns of a lane are.
  const int bytes = l.dtype == DType::f32 ? 4 : 2;
  const bool together = l.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(l.out) % (2 * bytes) == 0;
  Column column[kColumnFragments][2];
  int64_t outputs[kColumnFragments][2];
#pragma unroll
  for (int j = 0; j < kColumnFragments; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      outputs[j][e] = output_of(p, at.column, at.warp_column + j * 8 + at.lane % 4 * 2 + e);
      column[j][e] = outputs[j][e] < 0 ? Column{} : column_of(p, outputs[j][e]);
    }
#pragma unroll
  for (int i = 0; i < kCount; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t m = at.row + at.warp_row + i * 16 + half * 8 + at.lane / 4;
      if (m >= l.rows) continue;
      float scale = 1.0f, y[kColumnFragments][2];
      int32_t zero = 0;
      if constexpr (kDigits != Digits::groups) scale = p.digits.scale[m], zero = p.digits.zero[m];
#pragma unroll
      for (int j = 0; j < kColumnFragments; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int at_sum = half * 2 + e;
          if constexpr (kDigits == Digits::groups)
            y[j][e] = __fadd_rn(totals[i][j][at_sum], column[j][e].bias);
          else
            y[j][e] =
                linear(column[j][e], scale, zero, low[i][j][at_sum], kDigits == Digits::two ? high[i][j][at_sum] : 0);
        }
#pragma unroll
      for (int j = 0; j < kColumnFragments; j++) {
        if (p.pairs && j >= kColumnFragments / 2) continue;
        constexpr int kSecond = kColumnFragments / 2;
        float result[2];
#pragma unroll
        for (int e = 0; e < 2; e++)
          result[e] = outputs[j][e] < 0
                          ? 0.0f
                          : finish(l, p.pairs, m, outputs[j][e], y[j][e], y[(j + kSecond) % kColumnFragments][e]);
        if (together && outputs[j][1] >= 0) {
          put_two(l, m, outputs[j][0], result[0], result[1]);
        } else {
          if (outputs[j][0] >= 0) put(l, m, outputs[j][0], result[0]);
          if (outputs[j][1] >= 0) put(l, m, outputs[j][1], result[1]);
        }
      }
    }
}

// Neighbouring blocks take the same columns, row_tiles of them, so that these weights come from memory once.
template <int kTileRows, Digits kDigits>
__global__ void __launch_bounds__(kBlock) tiles_kernel(const __grid_constant__ Int8CudaParams p, int row_tiles) {
  using T = Tile<kTileRows, kDigits>;
  constexpr bool kTwo = T::kTwo, kGroups = kDigits == Digits::groups;
  constexpr int kCount = T::kRowFragments;
  extern __shared__ uint4 stages[];
  device::note_shared_bytes<T::kShared>();
  __shared__ uint32_t any_bits[kTwo ? kMostWords : 1];  // for each piece of k whether a row of the tile has high digits
  const Int8LinearParams& l = p.linear;
  const int depth = static_cast<int>(l.depth), tiles = (depth + kTileDepth - 1) / kTileDepth;
  const int warp = threadIdx.x / 32;
  const Position at = {int64_t{blockIdx.x % row_tiles} * kTileRows, blockIdx.x / row_tiles,
                       static_cast<int>(threadIdx.x) % 32, warp / kWarpColumns * T::kRows,
                       warp % kWarpColumns * kColumns};
  const uint32_t shared = device::shared_address(stages);

  if constexpr (kTwo) {
    const int words = static_cast<int>(p.digits.words);
    const int rows = static_cast<int>(min(int64_t{kTileRows}, l.rows - at.row));
    for (int i = threadIdx.x; i < words; i += kBlock) any_bits[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < rows * words; i += kBlock)
      if (const uint32_t bits = p.digits.bits[at.row * words + i]) atomicOr(&any_bits[i % words], bits);
    __syncthreads();
  }
  // Whether `count` pieces from k on have high digits; all of them are in one word.
  auto any_high = [&](int k, int count) {
    return (any_bits[k / kDigitsOfWord] >> (k / kDigitPiece % 32) & ((1u << count) - 1)) != 0;
  };

  int64_t outputs[kTileColumns * kPieces / kBlock];
#pragma unroll
  for (int i = 0; i < kTileColumns * kPieces / kBlock; i++)
    outputs[i] = output_of(p, at.column, threadIdx.x / kPieces + i * (kBlock / kPieces));
  auto copy = [&](int tile) {
    if (tile < tiles) {
      const uint32_t to = shared + tile % T::kStages * T::kStageBytes;
      copy_activations<T, kTileRows>(p, at.row, tile * kTileDepth, to);
      copy_weights<T>(p, outputs, tile * kTileDepth, to);
      if constexpr (kTwo)
        if (any_high(tile * kTileDepth, kPieces)) copy_high_digits<T, kTileRows>(p, at.row, tile * kTileDepth, to);
    }
    device::commit_copies();
  };

  int32_t low[kCount][kColumnFragments][4] = {}, high[kTwo ? kCount : 1][kColumnFragments][4] = {};
  float totals[kGroups ? kCount : 1][kColumnFragments][4] = {};
  int group = 0, group_end = kGroups ? static_cast<int>(l.quantize.group) : 0;
  for (int stage = 0; stage < T::kStages - 1; stage++) copy(stage);
  for (int tile = 0; tile < tiles; tile++) {
    device::wait_for_copies<T::kStages - 2>();
    __syncthreads();  // the tile is there for all, and nobody reads the one before any more, whose stage is next
    copy(tile + T::kStages - 1);
    const uint32_t from = shared + tile % T::kStages * T::kStageBytes;
#pragma unroll
    for (int step = 0; step < kTileDepth / kMultiplyDepth; step++) {
      const int k = tile * kTileDepth + step * kMultiplyDepth, piece = step * (kMultiplyDepth / kDigitPiece);
      uint32_t x[kCount][4], w[kColumnFragments / 2][4];
      load_rows<kCount>(from + T::kLow, at.warp_row, piece, at.lane, x);
      load_columns(from + T::kWeight, at.warp_column, piece, at.lane, w);
      multiply<kGroups, kCount>(x, w, low);
      if constexpr (kTwo)
        if (k < depth && any_high(k, kMultiplyDepth / kDigitPiece)) {
          load_rows<kCount>(from + T::kHigh, at.warp_row, piece, at.lane, x);
          multiply<true, kCount>(x, w, high);
        }
      if constexpr (kGroups)
        if (k < depth && (k + kMultiplyDepth >= group_end || k + kMultiplyDepth >= depth)) {
          add_group<kCount>(p, at, group++, low, totals);
          group_end += static_cast<int>(l.quantize.group);
        }
    }
  }
  finish_tile<kDigits, kCount>(p, at, low, high, totals);
}

template <int kTileRows, Digits kDigits>
void tiles_of(const Int8CudaParams& p, int device, void* stream) {
  const int64_t columns = p.pairs ? kTileColumns / 2 : kTileColumns;
  const int64_t outputs = p.pairs ? p.linear.outputs / 2 : p.linear.outputs;
  const int64_t row_tiles = (p.linear.rows + kTileRows - 1) / kTileRows;
  device::launch_blocks("int8_tiles", device, stream, row_tiles * ((outputs + columns - 1) / columns), kBlock,
                        Tile<kTileRows, kDigits>::kShared, tiles_kernel<kTileRows, kDigits>, p,
                        static_cast<int>(row_tiles));
}

template <Digits kDigits>
void tiles(const Int8CudaParams& p, int device, void* stream) {
  // Tiles of 64 rows where those of 128 would be half empty, or too few to give every processor one.
  constexpr int64_t kEnough = 128;
  const int64_t large = ((p.linear.rows + 127) / 128) * ((p.linear.outputs + kTileColumns - 1) / kTileColumns);
  const bool small = p.tile_rows ? p.tile_rows == 64 : p.linear.rows <= 64 || large < kEnough;
  if constexpr (kDigits == Digits::groups)
    tiles_of<64, kDigits>(p, device, stream);  // 128 rows and their totals take more registers than there are
  else if (small)
    tiles_of<64, kDigits>(p, device, stream);
  else
    tiles_of<128, kDigits>(p, device, stream);
}

}  // namespace llmkern::int8

namespace llmkern {

void int8_tiles_cuda(const Int8CudaParams& p, int device, void* stream) {
  switch (p.digits.kind) {
    case Digits::one:
      return int8::tiles<Digits::one>(p, device, stream);
    case Digits::two:
      return int8::tiles<Digits::two>(p, device, stream);
    default:
      return int8::tiles<Digits::groups>(p, device, stream);
  }
}

}  // namespace llmkern
