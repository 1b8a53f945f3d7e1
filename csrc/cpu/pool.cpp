#include "cpu/pool.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_bn_act/instructions.h"

#ifdef __x86_64__
#define RF_AVX2 __attribute__((target("avx2")))
#else
#define RF_AVX2
#endif

namespace rf::cpu {

namespace {

constexpr int64_t kElements = 1 << 15;  // that are worth a thread

struct Bf16 {
  uint16_t bits;
};

inline float number(float value) { return value; }
inline float number(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void round_to(float value, float& to) { to = value; }
inline void round_to(float value, Bf16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to.bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The pixels of the output from `begin` to `end`, counted over all images.
template <class T>
[[gnu::always_inline]] inline void pool_pixels(const MaxPool& p, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t column = pixel % p.out_width, row = pixel / p.out_width % p.out_height;
    const int64_t image = pixel / (p.out_width * p.out_height);
    T* const out = static_cast<T*>(p.out) + pixel * p.channels;
    bool first = true;
    for (int64_t i = 0; i < p.kernel[0]; ++i) {
      const int64_t y = row * p.stride[0] - p.padding[0] + i * p.dilation[0];
      if (y < 0 || y >= p.height) continue;
      for (int64_t j = 0; j < p.kernel[1]; ++j) {
        const int64_t x = column * p.stride[1] - p.padding[1] + j * p.dilation[1];
        if (x < 0 || x >= p.width) continue;
        const T* const from = static_cast<const T*>(p.x) + ((image * p.height + y) * p.width + x) * p.channels;
        if (first) {
          std::memcpy(out, from, static_cast<size_t>(p.channels) * sizeof(T));
          first = false;
          continue;
        }
        for (int64_t c = 0; c < p.channels; ++c) {
          const float value = number(from[c]);
          out[c] = value > number(out[c]) || value != value ? from[c] : out[c];
        }
      }
    }
  }
}

template <class T>
RF_AVX2 void pool_wide(const MaxPool& p, int64_t begin, int64_t end) {
  pool_pixels<T>(p, begin, end);
}

template <class T>
void pool_plain(const MaxPool& p, int64_t begin, int64_t end) {
  pool_pixels<T>(p, begin, end);
}

template <class T>
void pool_all(const MaxPool& p) {
  const auto run = instructions(false, "avx2") == Instructions::kNone ? pool_plain<T> : pool_wide<T>;
  torch::stable::parallel_for(0, p.images * p.out_height * p.out_width, divide_up(kElements, p.channels),
                              [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

template <class T>
void mean_all(const T* x, T* out, int64_t images, int64_t pixels, int64_t channels) {
  torch::stable::parallel_for(0, images, divide_up(kElements, pixels * channels), [&](int64_t begin, int64_t end) {
    std::vector<double> sums(static_cast<size_t>(channels));
    for (int64_t image = begin; image < end; ++image) {
      std::fill(sums.begin(), sums.end(), 0.0);
      const T* from = x + image * pixels * channels;
      for (int64_t pixel = 0; pixel < pixels; ++pixel, from += channels) {
        for (int64_t c = 0; c < channels; ++c) sums[static_cast<size_t>(c)] += number(from[c]);
      }
      for (int64_t c = 0; c < channels; ++c) {
        round_to(static_cast<float>(sums[static_cast<size_t>(c)] / static_cast<double>(pixels)), out[image * channels + c]);
      }
    }
  });
}

}  // namespace

void max_pool(const MaxPool& pool, bool bf16) { bf16 ? pool_all<Bf16>(pool) : pool_all<float>(pool); }

void mean(const void* x, void* out, int64_t images, int64_t pixels, int64_t channels, bool bf16) {
  if (bf16) return mean_all(static_cast<const Bf16*>(x), static_cast<Bf16*>(out), images, pixels, channels);
  mean_all(static_cast<const float*>(x), static_cast<float*>(out), images, pixels, channels);
}

}  // namespace rf::cpu
