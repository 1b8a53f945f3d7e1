// Winograd convolution on the CPU: the problem, and the kernel for each instruction set.
#pragma once

#include <cstdint>
#include <string>

namespace rf::winograd {

constexpr int kPanel = 32;                // output channels computed together
constexpr float kNearInfinity = 0x1p30f;  // an output that overflows when multiplied with this counts as infinite

// Dense channels_last tensors; filters is [K/32, 16, C/elements, 32, elements of 32 bits: one float or two bfloat16],
// scale and bias are [K]; C is a multiple of 16, K of 32.
struct Problem {
  const void* x;
  const void* filters;
  const float* scale;
  const float* bias;
  const void* residual;  // or null
  void* out;
  int64_t images, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t pad_height, pad_width;
  bool relu;
};

// Computes these tiles of 2x2 outputs in these panels of output channels. False: some output is not finite, so that the
// direct sum may differ (where that is infinite, the transforms give NaN). buffer holds buffer_floats(tiles, units).
using Run = bool(const Problem&, int64_t first_tile, int64_t tiles, int64_t first_panel, int64_t panels, float* buffer);

// The sum of the squares of every one of these pixels of x, counted over all images.
using Energies = void(const Problem&, int64_t first_pixel, int64_t pixels, float* energies);

// Transforms the filters of one panel of output channels and of a vector's worth of input channels from first_channel
// on: G·g·Gᵀ in double, rounded once. weight is [K, C, 3, 3], contiguous or [K, 3, 3, C]; filters as in Problem, of
// floats. A kernel for bfloat16 has none.
using Filters = void(const float* weight, bool contiguous, int64_t channels, int64_t panel, int64_t first_channel,
                     float* filters);

struct Kernel {
  Run* run;
  Energies* energies;
  Filters* filters;
  int64_t lanes;  // floats of a vector
};

// units: of 32 bits, that the channels of a pixel take.
inline int64_t buffer_floats(int64_t tiles, int64_t units) { return 16 * tiles * (units + kPanel); }

namespace avx512 {
extern const Kernel kernel;
}
namespace avx512bf16 {
extern const Kernel kernel;
}
namespace avx2 {
extern const Kernel kernel;
}

// The kernel for these instructions, "" for the widest that this CPU has; null where it has none.
const Kernel* kernel(bool bf16, const std::string& isa);

// The whole problem, shared out among torch's threads; the answer is that of Run. It is false at once
// where the input is not balanced: see balance.h.
bool convolve(const Problem& problem, bool bf16, const Kernel& kernel);

}  // namespace rf::winograd
