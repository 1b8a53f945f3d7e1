// conv_bn_act on the CPU by oneDNN, through torch's operators: no Python, nothing kept between calls.
#pragma once

#include "common/conv_bn.h"

namespace rf::onednn {

// Whether this build of torch and this CPU have fused convolutions in this dtype.
bool supports(ScalarType dtype);

// A convolution with its batch norm folded in (in float32) and its weight in the layout that oneDNN wants.
class Prepared {
 public:
  // For inputs of these sizes; of others it is right too, but slower.
  Prepared(const ConvBN& conv, const std::vector<int64_t>& input);

  // Convolution, batch norm and sum, channels_last in and out, without the ReLU, since oneDNN's own loses NaN. Writes
  // its sum into the residual where told to.
  Tensor operator()(const Tensor& x, const OptionalTensor& residual = {}, bool into_residual = false) const;

 private:
  Tensor weight_, bias_;
  std::vector<int64_t> stride_, padding_, dilation_;
  int64_t groups_;
};

// How many images to take at a time: all, or a share, even where n allows it, whose buffers stay small enough for the
// heap to hand the same memory out again.
int64_t sub_batch(int64_t n, int64_t bytes_per_image);

inline Tensor relu_(const Tensor& y) { return call("aten::relu_", "", y); }

// out[at : at + len(y)] = relu(y)
void relu_into(Tensor& out, int64_t at, const Tensor& y);

Tensor run(const Tensor& x, const ConvBN& conv, const OptionalTensor& residual, bool relu);

}  // namespace rf::onednn
