#include "common/reference.h"

namespace rf {

namespace {

std::vector<int64_t> list(const Pair& pair) { return {pair[0], pair[1]}; }

std::vector<int64_t> strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides.begin(), strides.end()};
}

// c10's rule for what suggests channels_last: strides that grow from C over W and H to N; anything ambiguous does not.
bool suggests_channels_last(const Layout& layout) {
  const auto& [sizes, strides] = layout;
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (const int dim : {1, 3, 2, 0}) {
    if (sizes[dim] == 0 || strides[dim] < least) return false;
    if (dim == 0 && least == strides[1]) return false;
    least = strides[dim] * (sizes[dim] > 1 ? sizes[dim] : 1);
  }
  return true;
}

}  // namespace

Tensor reference(const Tensor& x, const ConvBN& conv, const OptionalTensor& residual, bool relu) {
  OptionalTensor bias = conv.bias;  // float32 beside half precision under autocast
  if (bias && bias->scalar_type() != x.scalar_type()) {
    Tensor narrow = empty_strided({bias->size(0)}, {1}, x.scalar_type(), x);
    bias = torch::stable::copy_(narrow, *conv.bias);
  }
  Tensor y = call("aten::conv2d", "", x, conv.weight, bias, list(conv.stride), list(conv.padding),
                  list(conv.dilation), conv.groups);
  y = call("aten::batch_norm", "", y, conv.gamma, conv.beta, OptionalTensor(conv.mean), OptionalTensor(conv.var), false,
           0.0, conv.eps, true);
  if (residual) y = torch::stable::subtract(y, *residual, -1.0);  // the stable ABI has no sum with a factor
  return relu ? call("aten::relu", "", y) : y;
}

Layout layout_of(const Tensor& tensor) { return {sizes_of(tensor), strides_of(tensor)}; }

Layout conv_layout(const Layout& x, const Tensor& weight, std::vector<int64_t> sizes) {
  const int64_t k = sizes[1], p = sizes[2], q = sizes[3];
  if (suggests_channels_last(x) || suggests_channels_last(layout_of(weight))) {
    return {std::move(sizes), {k * p * q, 1, q * k, k}};
  }
  return {std::move(sizes), {k * p * q, p * q, q, 1}};
}

Layout sum_layout(const Layout& a, const Layout& b, const Tensor& like) {
  return {a.sizes, sum_strides(a.sizes, a.strides, b.strides, like.scalar_type())};
}

Tensor laid_out(const Tensor& tensor, const Layout& layout) {
  bool same = true;
  for (size_t i = 0; i < layout.sizes.size(); ++i) {
    same = same && (layout.sizes[i] == 1 || layout.strides[i] == tensor.stride(static_cast<int64_t>(i)));
  }
  if (same) return tensor;
  Tensor out = empty_strided(layout.sizes, layout.strides, tensor.scalar_type(), tensor);
  return torch::stable::copy_(out, tensor);
}

}  // namespace rf
