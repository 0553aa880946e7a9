// Prints the results of the operations of csrc/common/simd and csrc/int8/dot.h on fixed bit patterns, for the
// instruction set that it is compiled for. Equal output shows that the emulation of AVX-512 does what the processor
// does, and that NEON computes what portable C++ does.
#include <cstdio>

#include "../../csrc/int8/dot.h"

using namespace llmkern::LLMKERN_ISA;
using llmkern::Bf16;
using llmkern::Fp16;

namespace {

uint32_t next_random() {  // xorshift, Marsaglia 2003
  static uint32_t x = 2463534242u;
  x ^= x << 13, x ^= x >> 17, x ^= x << 5;
  return x;
}

// Numbers of every size, with the special ones among them.
void fill(float* to, int count, bool finite) {
  const uint32_t special[] = {0, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00001u, 1u, 0x807fffffu, 0x3f808000u};
  for (int i = 0; i < count; i++) {
    uint32_t r = next_random(), b = next_random();
    if (finite) b = (b & 0x807fffffu) | (0x3f000000u + (r % 64 << 21));
    if (!finite && r % 4 == 0) b = special[r / 4 % 8];
    std::memcpy(to + i, &b, 4);
  }
}

void print(const char* name, const void* data, size_t bytes) {
  std::printf("%s: ", name);
  for (size_t i = 0; i < bytes; i++) std::printf("%02x", static_cast<const unsigned char*>(data)[i]);
  std::printf("\n");
}
void show(const char* name, Float x) {
  float lanes[kWidth];
  store(lanes, x);
  for (float& lane : lanes)
    if (lane != lane) lane = __builtin_nanf("");  // which NaN comes of two is nobody's promise
  print(name, lanes, sizeof lanes);
}
void show(const char* name, Int x) { show(name, add(as_float(x), zero())), print(name, &x, sizeof x); }

template <class T>
void conversions(const char* name, Float a) {
  T stored[2 * kWidth] = {};
  store(stored, a);
  print(name, stored, 2 * kWidth);
  show(name, load(stored));
  for (int n = 0; n <= kWidth; n++) {
    store_first(stored + kWidth, a, n);
    show(name, load_first(stored, n));
  }
  print(name, stored, sizeof stored);
}

}  // namespace

int main() {
  for (int round = 0; round < 200; round++) {
    bool finite = round % 2;
    float x[3 * kWidth];
    uint8_t bytes[4 * kWidth];
    fill(x, 3 * kWidth, finite);
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(next_random() % 3 ? next_random() : 0);
    Float a = load(x), b = load(x + kWidth), c = load(x + 2 * kWidth);
    show("add", add(a, b)), show("sub", sub(a, b)), show("mul", mul(a, b)), show("div", div(a, b));
    show("fma", fma(a, b, c)), show("max", max(a, b)), show("min", min(a, b)), show("abs", abs(a));
    show("swap", swap_pairs(a)), show("equal", where_equal(a, b, b, c)), show("less", where_less(a, b, b, c)),
        show("broadcast", broadcast(x[round % kWidth]));
    show("keep", keep(bytes, a, b));
    for (int n = 0; n <= kWidth; n++) show("first", first(n, a, b)), show("load", load_first(x, n));
    Int i = as_int(a), j = as_int(b);
    show("int add", add(i, j)), show("int sub", sub(i, j)), show("int mul", mul(i, j));
    show("shift", shift_left<23>(i)), show("to float", to_float(i)), show("int", broadcast_int(round - 100));
    conversions<Bf16>("bf16", a), conversions<Fp16>("fp16", a);
    show("round", round_to_int(finite ? mul(a, broadcast(1e-3f)) : a));
    Float whole = first(round % kWidth, to_float(broadcast_int(round)), broadcast(7));  // nothing to round
    float whole_sum = sum(whole);
    print("whole sum", &whole_sum, 4), show("whole fma", fma(whole, broadcast(3), swap_pairs(whole)));
    show("whole dot bf16", dot_bf16(whole, as_int(whole), as_int(whole)));
    if (finite) {
      float total = sum(a), most = largest(a);
      print("sum", &total, 4), print("largest", &most, 4);
    }
    Bf16 flushed[3 * kWidth];
    store_flushed(flushed, a);
    store_flushed(flushed + kWidth, a, b);
    print("flushed", flushed, sizeof flushed);
    float pairs[kWidth];
    store_pairs(pairs, a, b);
    print("pairs", pairs, sizeof pairs);
    show("dot bf16", dot_bf16(c, i, j));
    Float square[kWidth];
    for (int row = 0; row < kWidth; row++) square[row] = add(a, broadcast(static_cast<float>(row)));
    transpose(square);
    for (Float row : square) show("transposed", row);
    Low low[kWidth];
    High high[kWidth];
    store_low(low, broadcast_int(3 * round - 100));
    print("low", low, sizeof low);
    Int w = load_weights(reinterpret_cast<const int8_t*>(bytes));
    show("dot", dot(i, broadcast_step(low), w));
    Int u = round_to_int(mul(first(round % kWidth, broadcast(7), a), broadcast(finite ? 1e-3f : 1.0f)));
    u = finite ? u : broadcast_int(300 * round - 32000);
    store_digits(low, high, u);
    print("low digits", low, sizeof low), print("high digits", high, sizeof high);
    int quads = high_quads(u);
    print("quads", &quads, sizeof quads);
    show("dot low", dot(i, broadcast_step(low), w));
    show("dot high", dot_high(i, broadcast_step(high), high_weights(w)));
    Int run[kRun];
    Low lows[64];
    High highs[64];
    for (int v = 0; v < kRun; v++) run[v] = v % 2 ? u : broadcast_int(97 * v + 11 * round - 700);
    store_lows(lows, run);
    print("64 low", lows, sizeof lows);
    quads = store_both(lows, highs, run);
    print("64 low digits", lows, sizeof lows), print("64 high digits", highs, sizeof highs);
    print("64 quads", &quads, sizeof quads);
  }
}
