// One conv_bn_act problem as plain data: what the host plans on and the kernels read.
#pragma once

#include <cstdint>

namespace rf::conv {

enum class Element { kBF16, kFP16, kFP32 };

constexpr int element_bytes(Element element) { return element == Element::kFP32 ? 4 : 2; }

// Bits of Args::wide: which of the per-channel vectors are float32 whatever the element type.
enum Wide : unsigned { kWideBias = 1, kWideGamma = 2, kWideBeta = 4, kWideMean = 8, kWideVar = 16 };

// y[m, k] = act((Σ x·w + bias[k] − mean[k]) · gamma[k]/√(var[k]+eps) + beta[k] + residual[m, k]),
// m over the n·p·q output pixels. x is NHWC with contiguous channels, weight is dense [k, r, s, c/groups].
struct Args {
  const void* x;
  const void* weight;
  const void* bias;  // may be null, and so may gamma, beta and residual
  const void* gamma;
  const void* beta;
  const void* mean;
  const void* var;
  const void* residual;
  void* out;
  float* workspace;  // splits × m × k partial sums when splits > 1

  int64_t n;
  int h, w, c, k, r, s, p, q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t x_stride_n, x_stride_h, x_stride_w;  // in elements
  int64_t residual_stride, out_stride;         // from one pixel to the next, in elements
  float eps;
  unsigned wide;
  bool relu;

  // Set by the plan.
  bool vector_out;  // the output, the residual and the workspace take 16-byte accesses
  int splits;
  int steps_per_split;  // of the reduction, in tiles
  int tiles_n;
};

}  // namespace rf::conv
