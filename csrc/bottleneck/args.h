// One bottleneck as plain data: what the host plans on and the kernels read.
#pragma once

#include <cstdint>

namespace rf::bottleneck {

enum class Element { kBF16, kFP16 };

// Bits of Conv::wide: which of the per-channel vectors are float32 whatever the element type.
enum Wide : unsigned { kWideBias = 1, kWideGamma = 2, kWideBeta = 4, kWideMean = 8, kWideVar = 16 };

// A convolution with its batch norm; bias, gamma and beta may be null.
struct Conv {
  const void* weight;  // dense [k, r, s, c], 16-byte aligned
  const void* bias;
  const void* gamma;
  const void* beta;
  const void* mean;
  const void* var;
  float eps;
  unsigned wide;
};

// out = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut), the shortcut a projection of x or x itself.
// Both hidden tensors are rounded to the element type once; sums, batch norm and the last addition are float32.
struct Args {
  const void* x;  // NHWC with contiguous channels, 16-byte aligned pixels
  void* out;      // dense NHWC [n, p, q, 4·mid]
  Conv conv1, conv2, conv3, shortcut;  // shortcut.weight is null where x is added

  int n, h, w, p, q;
  int64_t x_stride_n, x_stride_h, x_stride_w;  // in elements

  // Set by the plan.
  int tiles_h, tiles_w, tiles;
};

}  // namespace rf::bottleneck
