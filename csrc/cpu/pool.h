// Pooling on the CPU, of dense channels_last images.
#pragma once

#include "common/torch.h"

namespace rf::cpu {

// Maxima of windows as aten takes them: a NaN wins, padding never does.
struct MaxPool {
  const void* x;
  void* out;
  int64_t images, height, width, channels, out_height, out_width;
  Pair kernel, stride, padding, dilation;
};

void max_pool(const MaxPool& pool, bool bf16);

// out[n, c]: the mean of channel c of image n, summed in float64 and rounded once.
void mean(const void* x, void* out, int64_t images, int64_t pixels, int64_t channels, bool bf16);

}  // namespace rf::cpu
