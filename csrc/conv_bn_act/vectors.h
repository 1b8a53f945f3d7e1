// Vectors of float32 sums, and the tensors' elements that they are loaded from and rounded to, for the kernels of one
// instruction set: RF_ISA, RF_LANES and RF_BF16 as in the kernels' own headers.
#pragma once

#if RF_BF16
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

namespace rf::vectors::RF_ISA {

namespace {

using Index = int64_t;

typedef float Vector __attribute__((vector_size(RF_LANES * 4)));

constexpr int kLanes = RF_LANES;

// Through memcpy, one instruction each: a tensor may begin at any byte.
inline Vector load(const float* at) {
  Vector value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
inline void store(float* at, Vector value) { std::memcpy(at, &value, sizeof value); }
inline Vector zero() { return Vector{}; }

// The lanes of a whose numbers have `bit` change places with those of b that have it not.
template <int BIT, int... LANE>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, LANE...>) {
  const Vector first = __builtin_shufflevector(a, b, (LANE & BIT ? kLanes + LANE - BIT : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE & BIT ? kLanes + LANE : LANE + BIT)...);
  a = first;
}

// kLanes vectors of kLanes words of 32 bits as a matrix, transposed.
template <int BIT = 1>
inline void transpose(Vector* rows) {
  if constexpr (BIT < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & BIT) == 0) exchange<BIT>(rows[i], rows[i | BIT], std::make_integer_sequence<int, kLanes>{});
    }
    transpose<BIT * 2>(rows);
  }
}

inline float total(Vector value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Factors come in units of 32 bits: one float, or two bfloat16 whose products are both added to one sum.
#if RF_BF16
using Element = uint16_t;

inline void add_product(Vector& sum, const float* left, Vector right) {
  int32_t pair;
  std::memcpy(&pair, left, sizeof pair);
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)right);
}
inline Vector load(const Element* at) {
  typedef Element Halves __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  Halves halves;
  std::memcpy(&halves, at, sizeof halves);
  return (Vector)(__builtin_convertvector(halves, Words) << 16);
}
inline void add_squares(Vector& sum, const Element* at) {
  __m512bh pairs;
  std::memcpy(&pairs, at, sizeof pairs);
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, pairs, pairs);
}
inline void add_products(Vector& sum, Vector left, Vector right) {
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
// Adds zero times every element of a vector's bytes.
inline void see(Vector& seen, const Element* at) { seen += (load(at) + load(at + kLanes)) * 0.0f; }
inline float number(Element element) {
  const uint32_t bits = static_cast<uint32_t>(element) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void store(Element* at, Vector value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh((__m512)value));
}
#else
using Element = float;

inline void add_product(Vector& sum, const float* left, Vector right) { sum += *left * right; }
inline void add_squares(Vector& sum, const Element* at) {
  const Vector value = load(at);
  sum += value * value;
}
inline void add_products(Vector& sum, Vector left, Vector right) { sum += left * right; }
inline void see(Vector& seen, const Element* at) { seen += load(at) * 0.0f; }
inline float number(Element element) { return element; }
#endif

constexpr Index kElements = sizeof(float) / sizeof(Element);  // of a unit
// Sums in registers: as many as leave room for the right side and one broadcast.
#if RF_LANES == 16
constexpr int kRows = 14, kColumns = 2;
#else
constexpr int kRows = 6, kColumns = 2;
#endif

// Filters brought near while others are multiplied. Where these are multiplied in several passes, all of them together
// fetch as much of what comes next, which the first of the next passes alone would wait for; a single pass fetches what
// lies one page before it.
class Ahead {
 public:
  // filters, of `floats`, are multiplied in `passes` passes, of which this is one.
  Ahead(const float* filters, Index floats, Index pass, Index passes)
      : at_(filters + (passes == 1 ? kPage : floats + pass * floats / passes)), step_(kFloats / passes) {}
  void fetch(int column) const { __builtin_prefetch(at_ + column * kLanes, 0, 2); }  // into the second-level cache
  void next() { at_ += step_; }  // a unit of filters, kFloats, has been multiplied

 private:
  static constexpr Index kFloats = 32, kPage = 1024;
  const float* at_;
  Index step_;
};

}  // namespace

}  // namespace rf::vectors::RF_ISA
