// One convolution with its batch norm as the ops' arguments give it, and the checks on it.
#pragma once

#include "common/torch.h"

namespace rf {

// Statistics given. bias is the convolution's own; bias, gamma and beta may be absent.
struct ConvBN {
  Tensor weight;  // [K, C/groups, R, S]
  OptionalTensor bias, gamma, beta;
  Tensor mean, var;
  double eps;
  Pair stride, padding, dilation;
  int64_t groups;

  // Output sizes [N, K, P, Q] for an input [N, C, H, W].
  std::vector<int64_t> output_sizes(const std::vector<int64_t>& x) const;
};

// The eleven arguments of a convolution; nothing when the weight is None.
std::optional<ConvBN> read_optional_conv(Arguments& arguments);
ConvBN read_conv(Arguments& arguments);

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// The output's sizes; throws, naming the argument, unless `conv` can be applied to an input of these sizes with x's
// dtype and device.
std::vector<int64_t> check_conv(const Tensor& x, const ConvBN& conv, const std::vector<int64_t>& input,
                                const std::string& name = "");
void check_input(const Tensor& x);
void check_addend(const Tensor& addend, const std::vector<int64_t>& sizes, const Tensor& x, const char* name);

}  // namespace rf
