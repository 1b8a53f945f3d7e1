// Element types as raw bits, and their conversions: the same results on the device and under the host runtime.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RF_DEVICE __device__ __forceinline__
#else
#define RF_DEVICE inline
#endif

namespace rf {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// N elements that move as one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

#ifdef __CUDACC__

RF_DEVICE float to_float(float v) { return v; }
RF_DEVICE float to_float(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
RF_DEVICE float to_float(fp16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}

template <class T>
RF_DEVICE T from_float(float v);
template <>
RF_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
RF_DEVICE bf16 from_float<bf16>(float v) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}
template <>
RF_DEVICE fp16 from_float<fp16>(float v) {
  fp16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}

// The bits of v rounded to TF32, ties away from zero: the one rounding that every architecture from sm_80 on has.
RF_DEVICE uint32_t tf32_bits(uint32_t v) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(v)));
  return result;
}

RF_DEVICE float reciprocal_sqrt(float v) { return __frcp_rn(__fsqrt_rn(v)); }
RF_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

#else

inline float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(fp16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16;
  const uint32_t exponent = (v.bits >> 10) & 0x1f;
  const uint32_t mantissa = v.bits & 0x3ff;
  if (exponent == 0x1f) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  if (v != v) return {0x7fff};
  const uint32_t bits = bits_of(v);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float v) {
  if (v != v) return {0x7fff};
  const uint32_t bits = bits_of(v);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14 the step is 2^-24: adding 0.5 leaves the rounded count in the low bits
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1)) - (112u << 23)) >> 13)};
}

inline uint32_t tf32_bits(uint32_t v) {
  if ((v & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (v + 0x1000u) & 0xffffe000u;
}

inline float reciprocal_sqrt(float v) { return 1.0f / __builtin_sqrtf(v); }
inline float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

#endif

// One value of a vector of channels, of elements T or `wide`, float32.
template <class T>
RF_DEVICE float channel_value(const void* vector, bool wide, int64_t channel) {
  return wide ? static_cast<const float*>(vector)[channel] : to_float(static_cast<const T*>(vector)[channel]);
}

}  // namespace rf
