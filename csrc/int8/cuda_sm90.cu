// Products of many rows of activations with an int8 weight by wgmma, for Hopper alone.
//
// A block makes a tile of 128 rows by 128 or 256 columns, in roles that mbarriers keep in step. One thread lets TMA
// copy tiles of 128 values of k, of the low digits and of the weight, into a ring of stages. Two warps beside it bring
// what TMA cannot: high digits, whose pieces are there only where a bit says so, and the scales of groups. Two
// warpgroups multiply 64 rows each, with sums in registers; high digits for the 32 values of k where a row of the tile
// has one.
#ifndef LLMKERN_SM90
#define LLMKERN_SM90  // what is compiled is there
#endif
#include "../common/launch.cuh"
#include "../common/tensor_map.h"
#include "sm90_finish.cuh"
#include "sm90_produce.cuh"

namespace llmkern::int8::sm90 {

// A warpgroup's 64 rows.
template <class T>
struct Consumer {
  Shared<T> shared;
  const Int8CudaParams& p;
  const int which, thread;  // of the consumers; of the warpgroup
  Ring<T::kStages> ring;
  int32_t low[T::kSums], high[T::kTwo ? T::kSums : 1] = {};
  float totals[T::kGroups ? T::kSums : 1] = {};

  LLMKERN_DEVICE Consumer(Shared<T> shared, const Int8CudaParams& p, int which, int thread)
      : shared(shared), p(p), which(which), thread(thread) {}

  LLMKERN_DEVICE void await_tile() { barrier_wait(shared.control().full[ring.stage], ring.parity); }
  LLMKERN_DEVICE void release(int stage) { arrive_with_warp(shared.control().empty[stage]); }
  LLMKERN_DEVICE uint64_t rows_at(int offset) const {
    return descriptor(shared.stage(ring.stage) + offset + which * kRows * kSpan);
  }
  LLMKERN_DEVICE uint64_t weight() const { return descriptor(shared.stage(ring.stage) + T::kWeight); }

  // totals += the sums of a group, in units of what they stand for.
  LLMKERN_DEVICE void add_group(int unit) {
    const float* scales = shared.scales(ring.stage, unit);
    const int row = which * kRows + thread / 32 * kWarpRows + thread % 32 / 4;
    const float row_scale[2] = {scales[row], scales[row + 8]};
#pragma unroll
    for (int j = 0; j < T::kColumns / 8; j++) {
      const float2 columns = *reinterpret_cast<const float2*>(scales + kBlockRows + 8 * j + thread % 4 * 2);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float scale = __fmul_rn(row_scale[e / 2], e % 2 ? columns.y : columns.x);
        const int i = 4 * j + e;
        totals[i] = __fadd_rn(totals[i], __fmul_rn(static_cast<float>(low[i]), scale));
      }
    }
  }

  template <bool kAdd>
  LLMKERN_DEVICE void issue() {
    const uint64_t a = rows_at(T::kLow), b = weight();
    wgmma_fence();
    wgmma_bytes<false, kAdd>(low, a, b);
#pragma unroll
    for (int k = kStep; k < kDepth; k += kStep) wgmma_bytes<false, true>(low, advance(a, k), advance(b, k));
    wgmma_commit();
  }
  // Waits for its products, and those before: ptxas keeps none running over the end of a branch that has its own.
  LLMKERN_DEVICE void multiply_high(int begin, int end) {
    const uint64_t a = rows_at(T::kHigh), b = weight();
    wgmma_fence();
#pragma unroll
    for (int k = begin; k < end; k += kStep) wgmma_bytes<true, true>(high, advance(a, k), advance(b, k));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_sums(high);
  }
  LLMKERN_DEVICE void multiply_high(int t) {
    const uint32_t any = any_high(shared, t), steps = (any | any >> 1) & 0x55;
    if (any == 0) return;
    if (steps == 0x55) return multiply_high(0, kDepth);
#pragma unroll 1
    for (int k = 0; k < kDepth; k += kStep)
      if (steps >> (k / 16) & 1) multiply_high(k, k + kStep);
  }

  LLMKERN_DEVICE void multiply_groups(int tiles) {
#pragma unroll
    for (int i = 0; i < T::kSums; i++) low[i] = 0;
    bool adds = false;
    for (int t = 0; t < tiles; t++, ring.next()) {
      await_tile();
#pragma unroll
      for (int unit = 0; unit < T::kUnits; unit++) {
        const uint64_t a = rows_at(T::kLow), b = weight();
        wgmma_fence();
#pragma unroll
        for (int k = unit * T::kUnit; k < (unit + 1) * T::kUnit; k += kStep)
          wgmma_bytes_signed(low, advance(a, k), advance(b, k), adds || k > unit * T::kUnit);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_sums(low);
        adds = !ends_group(p, t * kDepth + (unit + 1) * T::kUnit, T::kUnit);
        if (!adds) add_group(unit);
      }
      release(ring.stage);
    }
  }

  // The products of a tile run while those of the next are issued.
  LLMKERN_DEVICE void multiply(int tiles) {
    await_tile();
    if constexpr (T::kTwo) {
      wgmma_sums(high);  // else the compiler writes their zeros behind the fence
      multiply_high(0);
    }
    issue<false>();
    for (int t = 1; t < tiles; t++) {
      const int before = ring.stage;
      ring.next();
      await_tile();
      issue<true>();
      if constexpr (T::kTwo) multiply_high(t);
      wgmma_wait<1>();
      release(before);
    }
    wgmma_wait<0>();
    wgmma_sums(low);
    wgmma_sums(high);
  }

  LLMKERN_DEVICE void finish(const Block& block, const RowScale& scale) {
    const int warp = thread / 32, lane = thread % 32;
    int32_t* cells = reinterpret_cast<int32_t*>(shared.memory) + (which * 4 + warp) * T::kCells;
    named_sync(kBoth, kConsumers * kWarpgroup);  // no stage is read any more
    if constexpr (T::kGroups)
      store_cells<T>(totals, reinterpret_cast<float*>(cells), lane);
    else
      store_cells<T>(low, cells, lane);
    if constexpr (T::kTwo) store_cells<T>(high, cells + T::kHighCells, lane);
    if (lane < kWarpRows) {
      cells[T::kRowScales + lane] = __float_as_int(scale.scale);
      cells[T::kRowScales + kWarpRows + lane] = scale.zero;
    }
    __syncwarp();
    finish_rows<T>(p, block, cells, first_row(block), lane);
  }
  LLMKERN_DEVICE int first_row(const Block& block) const {  // of this warp
    return block.row + which * kRows + thread / 32 * kWarpRows;
  }
};

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
    tiles_sm90_kernel(const __grid_constant__ CUtensorMap low, const __grid_constant__ CUtensorMap weight,
                      const __grid_constant__ Int8CudaParams p, const __grid_constant__ Raster raster) {
  extern __shared__ __align__(1024) char memory[];
  device::note_shared_bytes<T::kShared>();
  const Shared<T> shared = {memory};
  auto& control = shared.control();
  // The same for all threads of a warp, as the compiler sees too.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), helper = threadIdx.x - 32;
  if (threadIdx.x == 0) {
    tensor_prefetch(low), tensor_prefetch(weight);
    for (int i = 0; i < T::kStages; i++) {
      barrier_init(control.full[i], 1 + (T::kTwo || T::kGroups ? kHelperWarps : 0));
      barrier_init(control.empty[i], kConsumerWarps);
    }
    barrier_init_fence();
  }
  if constexpr (T::kTwo)
    for (int i = threadIdx.x; i < p.digits.words; i += kBlockThreads) control.any_bits[i] = 0;
  __syncthreads();
  const Block block(p, raster, T::kColumns);
  const int tiles = tiles_of(p);
  if (warp < 4) {
    registers_give<kProducerRegisters>();
    if (threadIdx.x == 0) produce(shared, low, weight, block, tiles);
    if (warp == 0) return;
    if constexpr (T::kTwo) gather_bits(shared, p, block.row);
    if (warp > kHelperWarps) return;
    if constexpr (T::kTwo) bring_high_digits(shared, p, block.row, tiles, helper);
    if constexpr (T::kGroups) bring_scales(shared, p, block, tiles, helper);
  } else {
    registers_take<kConsumerRegisters>();
    if constexpr (T::kTwo) gather_bits(shared, p, block.row);
    Consumer<T> consumer(shared, p, warp / 4 - 1, threadIdx.x % kWarpgroup);
    const RowScale scale(p, consumer.first_row(block), threadIdx.x % 32);
    if constexpr (T::kGroups)
      consumer.multiply_groups(tiles);
    else
      consumer.multiply(tiles);
    consumer.finish(block, scale);
  }
}

constexpr const char* kName = "int8_tiles_sm90";

// A matrix of bytes whose rows lie `step` apart and are copied `box_rows` at a time.
CUtensorMap map_of(const char* name, const void* data, int64_t rows, int64_t depth, int64_t step, int box_rows) {
  return tensor_map({name, data, {depth, rows, 1, 1}, {1, step, 1, 1}, {kDepth, box_rows, 1, 1}, 1}, kName);
}

int64_t column_tiles(const Int8CudaParams& p, int columns) {
  const int64_t outputs = p.pairs ? p.linear.outputs / 2 : p.linear.outputs, each = p.pairs ? columns / 2 : columns;
  return (outputs + each - 1) / each;
}
int64_t row_tiles(const Int8LinearParams& p) { return (p.rows + kBlockRows - 1) / kBlockRows; }

template <class T>
void launch(const Int8CudaParams& p, int device, void* stream) {
  DeviceGuard guard(device, kName);  // the driver is asked for its encoder there
  const Int8LinearParams& l = p.linear;
  const CUtensorMap low = map_of("the quantised inputs", p.digits.low, l.rows, l.depth, p.digits.stride, kBlockRows);
  const CUtensorMap weight = map_of("the weight", p.weight, l.outputs, l.depth, p.weight_stride, T::kHalf);
  const Raster raster = {static_cast<int>(row_tiles(l)), static_cast<int>(column_tiles(p, T::kColumns))};
  device::launch_blocks(kName, device, stream, int64_t{raster.row_tiles} * raster.column_tiles, kBlockThreads,
                        T::kShared, tiles_sm90_kernel<T>, low, weight, p, raster);
}

// Wide tiles bring fewer bytes to shared memory for a product, narrow ones may share out the work more evenly: whether
// those of `wide` columns take no longer than those of 128, by how often all processors work on one.
bool wide_pays(const Int8CudaParams& p, int wide) {
  if (p.tile_columns) return p.tile_columns != 128;
  constexpr int64_t kProcessors = 132;  // of an H100 or H200 with NVLink
  auto time = [&](int columns) {
    return (row_tiles(p.linear) * column_tiles(p, columns) + kProcessors - 1) / kProcessors * columns;
  };
  return time(wide) <= time(128);
}

template <Digits kDigits, int kWide>
void launch_wide(const Int8CudaParams& p, int device, void* stream) {
  if (wide_pays(p, kWide))
    launch<Tile<kDigits, kWide>>(p, device, stream);
  else
    launch<Tile<kDigits, 128>>(p, device, stream);
}

}  // namespace llmkern::int8::sm90

namespace llmkern {

const char* int8_tiles_sm90_unsupported(const Int8LinearParams& p) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (p.rows <= int8::sm90::kRows) return "its tiles for Hopper have 128 rows, of which up to 64 would leave half idle";
  if (p.depth == 0) return "its tiles for Hopper copy at least one value of k";
  if (p.quantize.group % 64 != 0) return "its tiles for Hopper take groups of multiples of 64 values of k";
  if (p.rows > kMost || p.outputs > kMost) return "its tiles for Hopper take at most 2**30 rows and outputs";
  return nullptr;
}

void int8_tiles_sm90(const Int8CudaParams& p, int device, void* stream) {
  using namespace int8::sm90;
  if (const char* reason = int8_tiles_sm90_unsupported(p.linear))
    throw std::runtime_error(std::string(kName) + ": " + reason);
  const int64_t group = p.linear.quantize.group;
  switch (p.digits.kind) {
    case Digits::one:
      return launch_wide<Digits::one, 256>(p, device, stream);
    case Digits::two:  // twice the sums: wider tiles would take more registers than there are
      return launch_wide<Digits::two, 192>(p, device, stream);
    default:
      return group % kDepth == 0 ? launch<Tile<Digits::groups, 128>>(p, device, stream)
                                 : launch<Tile<Digits::groups, 128, 64>>(p, device, stream);
  }
}

}  // namespace llmkern
