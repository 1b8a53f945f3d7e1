// Direct convolution on the CPU: the problem, and the kernel for each instruction set.
#pragma once

#include <cstdint>
#include <string>

namespace rf::direct {

constexpr int64_t kPanel = 32;  // output channels computed together

// The order in which filters are summed, and so the order in which they lie.
enum class Order {
  kPacked,        // [K/32, units, 32 channels, elements of a unit] of (row, column, channel)
  kChannelsLast,  // [K, row, column, channel]: a weight of torch's channels_last format, as it lies
  kContiguous,    // [K, channel, row, column]: a contiguous weight, as it lies
};

// Filters are summed in units of 32 bits: one float or two bfloat16, the last filled up with zero. Dense channels_last
// tensors; scale and bias are [K]; K is a multiple of 32.
struct Problem {
  const void* x;
  const void* filters;
  Order order;
  const float* scale;
  const float* bias;
  const void* residual;  // or null
  void* out;
  int64_t images, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width, dilate_height, dilate_width;
  bool relu;

  int64_t pixels() const { return images * out_height * out_width; }
  int64_t depth() const { return kernel_height * kernel_width * channels; }
};

constexpr int64_t kMostPixels = 112;  // that a thread takes at a time

// Computes these pixels of the output (counted over all images) in these panels of output channels. buffer holds
// buffer_floats(pixels, panels). False: a filter that is not packed holds an infinity or NaN, by which this multiplies
// padding too.
using Run = bool(const Problem&, int64_t first_pixel, int64_t pixels, int64_t first_panel, int64_t panels,
                 float* buffer);

constexpr int64_t kUnits = 256;           // units of a sum taken at a time: of 14 pixels they fill half the first cache
constexpr int64_t kStride = kUnits + 16;  // no power of two, whose lines would share few sets of that cache

// An output of so few pixels comes sooner from filters as they lie than from filters brought in order.
constexpr int64_t kFew = 8;
constexpr int64_t kMostLanes = 16;

inline int64_t buffer_floats(int64_t pixels, int64_t panels) {
  const int64_t sums = panels * kPanel * (pixels <= kFew ? kMostLanes : 1);
  return pixels * (kStride + sums) + kUnits * kPanel;
}

namespace avx512 {
Run run;
}
namespace avx512bf16 {
Run run;
}
namespace avx2 {
Run run;
}

// The kernel for these instructions, "" for the widest that this CPU has; null where it has none.
Run* kernel(bool bf16, const std::string& isa);

// The whole problem, shared out among torch's threads; the answer is that of Run.
bool convolve(const Problem& problem, bool bf16, Run* run);

}  // namespace rf::direct
