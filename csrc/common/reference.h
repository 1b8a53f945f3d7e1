// The same maths as chains of aten's own operators, on any device and in any dtype, and the strides that they give.
#pragma once

#include "common/conv_bn.h"

namespace rf {

// act(batch_norm(conv2d(x)) + residual); relu says whether there is an act.
Tensor reference(const Tensor& x, const ConvBN& conv, const OptionalTensor& residual, bool relu);

// A tensor as far as its strides decide those of a result.
struct Layout {
  std::vector<int64_t> sizes, strides;
};

Layout layout_of(const Tensor& tensor);

// The layout of a convolution's output, whose sizes are given: aten keeps channels_last when the input or the weight is.
Layout conv_layout(const Layout& x, const Tensor& weight, std::vector<int64_t> sizes);

// The layout of a sum.
Layout sum_layout(const Layout& a, const Layout& b, const Tensor& like);

// `tensor`, or a copy of it, in this layout. Strides of dimensions of size one mean nothing.
Tensor laid_out(const Tensor& tensor, const Layout& layout);

}  // namespace rf
