// New keys and values of a cache for CUDA: rotated, quantised and written in one pass, and the queries rotated.
//
// The lanes of a warp, or of a part of it, take a row, each up to 16 of its elements: eight and the eight that they are
// paired with, 16 bytes at a time where addresses allow it. They stay in registers while the lanes look for the
// largest, whose 127th part is an int8 row's scale. Rotary: Su et al. 2021, "RoFormer", section 3.4.
#include "../common/device.cuh"
#include "../common/launch.cuh"
#include "cuda_cache.h"

namespace llmkern {
namespace {

constexpr int kN = 8;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kSmallest = 1.17549435e-38f;  // a scale below has no inverse

LLMKERN_DEVICE int64_t integer_at(const char* data, bool is_64, int64_t i) {
  return is_64 ? reinterpret_cast<const int64_t*>(data)[i] : reinterpret_cast<const int32_t*>(data)[i];
}
LLMKERN_DEVICE int at_most(int a, int b) { return a < b ? a : b; }
LLMKERN_DEVICE int between(int x, int most) { return x < 0 ? 0 : at_most(x, most); }  // 0 and most

// A row that is read, and where it goes: to `to`, of T or, with a scale, of int8; null: nowhere.
struct Row {
  const void* from;
  void* to;
  float* scale;
  int64_t position;  // negative: nothing turns
  int width;
};

// How the work is cut: `lanes` of a row, a power of two; `written` rows of keys and values, then those of the queries.
struct CacheWork {
  int64_t written, rows;
  int lanes;
};

LLMKERN_DEVICE Row written_row(const CacheParams& p, int64_t number) {
  int64_t token = device::divide(number, 2 * p.kv_heads), head = number - token * 2 * p.kv_heads;
  int64_t b = device::divide(token, p.added), step = token - b * p.added;
  bool is_key = head < p.kv_heads;
  if (!is_key) head -= p.kv_heads;
  const AttentionTensor &x = is_key ? p.key : p.value, &cache = is_key ? p.key_cache : p.value_cache;
  int64_t place = integer_at(p.lengths.data, p.lengths.is_64, b * p.lengths.step) + step, page = b, row = place;
  bool exists = place >= 0 && place < p.capacity;
  if (p.pages.table && exists) {
    int64_t number_of_page = device::divide(place, p.pages.size);
    page = integer_at(p.pages.table, p.pages.is_64, b * p.pages.step + number_of_page);
    row = place - number_of_page * p.pages.size;
    exists = page >= 0 && page < p.pages.count;
  }
  float* scales = is_key ? p.key_scales : p.value_scales;
  const int64_t* steps = is_key ? p.key_scale_steps : p.value_scale_steps;
  // Of int8 or of 16-bit elements.
  char* to = cache.data + (page * cache.b + head * cache.h + row * cache.row) * (scales ? 1 : 2);
  if (scales) scales += page * steps[0] + head * steps[1] + row * steps[2];
  return {x.data + 2 * (b * x.b + head * x.h + step * x.row), exists ? to : nullptr, scales,
          is_key && p.rotation.cos ? (place < 0 ? p.rotation.length : place) : -1,
          static_cast<int>(is_key ? p.width : p.value_width)};
}

LLMKERN_DEVICE Row rotated_row(const CacheParams& p, int64_t number) {
  int64_t token = device::divide(number, p.heads), head = number - token * p.heads;
  int64_t b = device::divide(token, p.queries), i = token - b * p.queries;
  int64_t place = integer_at(p.lengths.data, p.lengths.is_64, b * p.lengths.step) + (p.ordered ? i : 0);
  const AttentionTensor &x = p.query, &out = p.rotated;
  return {x.data + 2 * (b * x.b + head * x.h + i * x.row), out.data + 2 * (b * out.b + head * out.h + i * out.row),
          nullptr, place < 0 ? p.rotation.length : place, static_cast<int>(p.width)};
}

// A lane's elements: `count[0]` from first[0] on and `count[1]` from first[1] on. Where they turn, they are pairs: the
// first four of them are number pair[0] and so on, the others pair[1] and so on, `pairs[0]` and `pairs[1]` are there.
struct Elements {
  int first[2], count[2], pair[2], pairs[2];

  LLMKERN_DEVICE Elements(const CacheParams& p, const Row& row, int lane) {
    int rotated = row.position < 0 ? 0 : static_cast<int>(p.rotation.rotated), half = rotated / 2;
    int blocks = (half + kN - 1) / kN;
    bool interleaved = p.rotation.interleaved;
    // Neighbours take neighbouring groups, so that what they read and write at once lies side by side.
    pair[0] = interleaved ? kN / 2 * lane : kN * lane, pair[1] = pair[0] + kN / 2 * (interleaved ? blocks : 1);
#pragma unroll
    for (int i = 0; i < 2; i++) pairs[i] = lane < blocks ? between(half - pair[i], kN / 2) : 0;
    if (lane < blocks) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        first[i] = interleaved ? 2 * pair[i] : pair[0] + i * half;
        count[i] = interleaved ? 2 * pairs[i] : pairs[0] + pairs[1];
      }
    } else {
      // First those of the others' first half, then those of the second.
      int others = row.width - rotated, middle = rotated + (others + 2 * kN - 1) / (2 * kN) * kN;
      first[0] = rotated + kN * (lane - blocks), first[1] = middle + kN * (lane - blocks);
      const int ends[2] = {at_most(middle, row.width), row.width};
#pragma unroll
      for (int i = 0; i < 2; i++) count[i] = between(ends[i] - first[i], kN);
    }
  }
  LLMKERN_DEVICE bool turn() const { return pairs[0] > 0; }
};

// Where a lane's eight angles come from: a row of a table, whether it is there, and whether neighbouring lanes trade.
struct Angles {
  int half;
  bool there, interleaved, trade;
};

// Floats of a table. Two lanes that turn neighbouring halves have a sector each: they read one after the other together
// and trade halves of them, for which all lanes of the warp take part.
template <bool kAligned>
LLMKERN_DEVICE void read_angles(const float* table, const Elements& e, const Angles& a, int lane, float* out) {
  if constexpr (kAligned) {
    bool odd = lane % 2 == 1;
    int at[2] = {e.pair[0], e.pair[1]};
    if (a.trade) (odd ? at[0] : at[1]) += odd ? -kN / 2 : kN / 2;
    uint4 x[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (a.there && at[i] < a.half && (a.trade || e.turn())) x[i] = device::load16(table + at[i]);
    if (a.trade) device::trade_halves(x[0], x[1], odd);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      out[4 * i] = device::bits_to_float(x[i].x), out[4 * i + 1] = device::bits_to_float(x[i].y);
      out[4 * i + 2] = device::bits_to_float(x[i].z), out[4 * i + 3] = device::bits_to_float(x[i].w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kN; i++) out[i] = a.there && i % 4 < e.pairs[i / 4] ? table[e.pair[i / 4] + i % 4] : 0.0f;
  }
}
template <bool kAligned, class T>
LLMKERN_DEVICE void read_angles(const T* table, const Elements& e, const Angles& a, int, float* out) {
  if constexpr (kAligned) {
    uint4 x = {};
    if (a.there && e.turn()) {
      if (a.interleaved) {
        uint2 low = *reinterpret_cast<const uint2*>(table + e.pair[0]);
        uint2 high = *reinterpret_cast<const uint2*>(table + e.pair[1]);
        x = make_uint4(low.x, low.y, high.x, high.y);
      } else {
        x = device::load16(table + e.pair[0]);
      }
    }
    device::widen_pair(x.x, out, T{}), device::widen_pair(x.y, out + 2, T{});
    device::widen_pair(x.z, out + 4, T{}), device::widen_pair(x.w, out + 6, T{});
  } else {
#pragma unroll
    for (int i = 0; i < kN; i++)
      out[i] = a.there && i % 4 < e.pairs[i / 4] ? device::widen(table[e.pair[i / 4] + i % 4]) : 0.0f;
  }
}

// Turns what the lane has of the row, if it turns at all. All lanes take part.
template <bool kAligned, class T>
LLMKERN_DEVICE void turn(const RotationTables& t, const Row& row, const Elements& e, int lane, int lanes, float* x) {
  float cos[kN], sin[kN];
  Angles a = {static_cast<int>(t.rotated / 2), row.to && row.position >= 0 && row.position < t.length, t.interleaved,
              !t.interleaved && lanes > 1};
  int64_t position = a.there ? row.position : 0;
  auto read = [&](auto element) {
    using A = decltype(element);
    read_angles<kAligned>(static_cast<const A*>(t.cos) + position * t.cos_step, e, a, lane, cos);
    read_angles<kAligned>(static_cast<const A*>(t.sin) + position * t.sin_step, e, a, lane, sin);
  };
  if (t.dtype == DType::f32)
    read(float{});
  else
    read(T{});
  if (!row.to || !e.turn()) return;
  if (!a.there) {
#pragma unroll
    for (int i = 0; i < kN; i++) cos[i] = sin[i] = device::bits_to_float(0x7fc00000u);
  }
  auto pair = [&](float& left, float& right, int i) {
    float a = left, b = right;
    left = device::widen(device::narrow(fmaf(a, cos[i], -(b * sin[i])), T{}));
    right = device::widen(device::narrow(fmaf(a, sin[i], b * cos[i]), T{}));
  };
  if (t.interleaved) {
#pragma unroll
    for (int i = 0; i < kN; i++) pair(x[2 * i], x[2 * i + 1], i);
  } else {
#pragma unroll
    for (int i = 0; i < kN; i++) pair(x[i], x[kN + i], i);
  }
}

// Eight elements as int8, `n` of them there.
LLMKERN_DEVICE void write_bytes(int8_t* to, const float* x, float scale, int n) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kN; i++) {
    float y = rintf(x[i] / scale);
    int byte = y != y ? 0 : static_cast<int>(fminf(fmaxf(y, -127), 127));
    words[i / 4] |= (byte & 0xffu) << (8 * (i % 4));
  }
  if (n == kN && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kN; i++)
    if (i < n) to[i] = static_cast<int8_t>(words[i / 4] >> (8 * (i % 4)));
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(device::kThreads)
    cache_kernel(const __grid_constant__ CacheParams p, const __grid_constant__ CacheWork w) {
  int lane = threadIdx.x % w.lanes, of_block = device::kThreads / w.lanes;
  for (int64_t first = int64_t{blockIdx.x} * of_block; first < w.rows; first += int64_t{gridDim.x} * of_block) {
    int64_t number = first + threadIdx.x / w.lanes;
    Row row = {nullptr, nullptr, nullptr, -1, 0};
    if (number < w.rows) row = number < w.written ? written_row(p, number) : rotated_row(p, number - w.written);
    if (!row.to) row.width = 0;
    Elements e(p, row, lane);
    float x[2 * kN] = {};
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (row.to && e.count[i] > 0)
        device::read<kAligned, kN>(static_cast<const T*>(row.from) + e.first[i], x + kN * i, e.count[i]);
    if (p.rotation.cos) turn<kAligned, T>(p.rotation, row, e, lane, w.lanes, x);
    if (p.key_scales) {  // the same for all threads, for the sake of the shuffles
      // As integers, infinities and NaN are the largest.
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < 2 * kN; i++) {
        uint32_t bits = device::float_to_bits(x[i]) & 0x7fffffffu;
        if (i % kN < e.count[i / kN] && bits > largest) largest = bits;
      }
      for (int step = w.lanes / 2; step > 0; step /= 2) {
        uint32_t other = __shfl_xor_sync(kAll, largest, step);
        largest = other > largest ? other : largest;
      }
      if (row.to && row.scale) {
        float scale = device::bits_to_float(largest) / 127;
        scale = scale < kSmallest ? 1 : scale - scale == 0 ? scale : device::bits_to_float(0x7fc00000u);
        if (lane == 0) *row.scale = scale;
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (e.count[i] > 0) write_bytes(static_cast<int8_t*>(row.to) + e.first[i], x + kN * i, scale, e.count[i]);
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (row.to && e.count[i] > 0)
        device::write<kAligned, kN>(static_cast<T*>(row.to) + e.first[i], x + kN * i, e.count[i]);
  }
}

// Whether the address, and every row's with these strides of elements of `size` bytes, is a multiple of 16 bytes.
bool aligned(const AttentionTensor& t, int64_t size) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.b * size % 16 == 0 && t.h * size % 16 == 0 &&
         t.row * size % 16 == 0;
}
bool aligned(const RotationTables& t) {
  int64_t size = t.dtype == DType::f32 ? 4 : 2;
  return t.rotated % 16 == 0 && reinterpret_cast<uintptr_t>(t.cos) % 16 == 0 && t.cos_step * size % 16 == 0 &&
         reinterpret_cast<uintptr_t>(t.sin) % 16 == 0 && t.sin_step * size % 16 == 0;
}

template <class T>
void cache_typed(const CacheParams& p, int device, void* stream) {
  bool rotates = p.rotation.cos != nullptr;
  CacheWork w = {};
  w.written = p.batch * p.added * 2 * p.kv_heads, w.rows = w.written + (rotates ? p.batch * p.queries * p.heads : 0);
  if (w.rows <= 0) return;
  int64_t half = rotates ? p.rotation.rotated / 2 : 0, others = p.width - 2 * half;
  int64_t blocks = (half + kN - 1) / kN + (others + 2 * kN - 1) / (2 * kN);
  int64_t of_values = (p.value_width + 2 * kN - 1) / (2 * kN);
  if (of_values > blocks) blocks = of_values;
  for (w.lanes = 1; w.lanes < blocks; w.lanes *= 2) continue;
  bool vectors = p.width % kN == 0 && p.value_width % kN == 0 && aligned(p.key, 2) && aligned(p.value, 2);
  if (rotates) vectors = vectors && aligned(p.rotation) && aligned(p.query, 2) && aligned(p.rotated, 2);
  if (!p.key_scales) vectors = vectors && aligned(p.key_cache, 2) && aligned(p.value_cache, 2);
  int64_t of_block = device::kThreads / w.lanes, grid = (w.rows + of_block - 1) / of_block;
  device::launch_blocks("cache_append", device, stream, grid < device::kMostBlocks ? grid : device::kMostBlocks,
                        device::kThreads, 0, vectors ? cache_kernel<T, true> : cache_kernel<T, false>, p, w);
}

}  // namespace

void cache_cuda(const CacheParams& p, int device, void* stream) {
  return p.dtype == DType::bf16 ? cache_typed<Bf16>(p, device, stream) : cache_typed<Fp16>(p, device, stream);
}

}  // namespace llmkern
