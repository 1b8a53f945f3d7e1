#include "conv_bn_act/onednn.h"

#include <algorithm>
#include <cmath>

#include "common/number.cuh"

namespace rf::onednn {

namespace {

constexpr int64_t kSubBatchBytes = 16 << 20;

std::vector<int64_t> list(const Pair& pair) { return {pair[0], pair[1]}; }

// What a query of torch's answers; no when this torch has no such operator.
bool asks(const char* op) {
  std::array<StableIValue, 1> stack{};
  return torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS &&
         torch::stable::detail::to<bool>(stack[0]);
}

bool exists(const char* op) {
  std::array<StableIValue, 1> stack{};
  return torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS;
}

std::vector<float> as_float(const Tensor& vector) {
  const Tensor dense = torch::stable::contiguous(vector);
  std::vector<float> values(static_cast<size_t>(vector.numel()));
  for (size_t i = 0; i < values.size(); ++i) {
    switch (vector.scalar_type()) {
      case ScalarType::BFloat16:
        values[i] = to_float(static_cast<const bf16*>(dense.data_ptr())[i]);
        break;
      case ScalarType::Half:
        values[i] = to_float(static_cast<const fp16*>(dense.data_ptr())[i]);
        break;
      default:
        values[i] = static_cast<const float*>(dense.data_ptr())[i];
    }
  }
  return values;
}

// out[k, …] = weight[k, …]·scale[k], both dense with K outermost.
template <class T>
void scale_rows(const Tensor& weight, const std::vector<float>& scale, const Tensor& out) {
  const auto rows = static_cast<int64_t>(scale.size());
  const int64_t width = rows == 0 ? 0 : weight.numel() / rows;
  const T* from = static_cast<const T*>(weight.data_ptr());
  T* to = static_cast<T*>(out.data_ptr());
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) {
                                  const float factor = scale[static_cast<size_t>(row)];
                                  for (int64_t i = row * width; i < (row + 1) * width; ++i) {
                                    to[i] = from_float<T>(to_float(from[i]) * factor);
                                  }
                                }
                              });
}

template <class T>
void store(const std::vector<float>& values, const Tensor& out) {
  for (size_t i = 0; i < values.size(); ++i) static_cast<T*>(out.data_ptr())[i] = from_float<T>(values[i]);
}

template <class F>
void by_dtype(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::BFloat16) return f(bf16{});
  if (dtype == ScalarType::Half) return f(fp16{});
  f(float{});
}

}  // namespace

bool supports(ScalarType dtype) {
  static const bool fp32 = exists("mkldnn::_is_mkldnn_bf16_supported");
  static const bool bf16 = asks("mkldnn::_is_mkldnn_bf16_supported");
  static const bool fp16 = asks("mkldnn::_is_mkldnn_fp16_supported");
  switch (dtype) {
    case ScalarType::Float:
      return fp32;
    case ScalarType::BFloat16:
      return bf16;
    case ScalarType::Half:
      return fp16;
    default:
      return false;
  }
}

Prepared::Prepared(const ConvBN& conv, const std::vector<int64_t>& input)
    : stride_(list(conv.stride)), padding_(list(conv.padding)), dilation_(list(conv.dilation)), groups_(conv.groups) {
  std::vector<float> scale = as_float(conv.var), bias = as_float(conv.mean);
  const std::vector<float> gamma = conv.gamma ? as_float(*conv.gamma) : std::vector<float>(scale.size(), 1.0f);
  const std::vector<float> beta = conv.beta ? as_float(*conv.beta) : std::vector<float>(scale.size(), 0.0f);
  const std::vector<float> own = conv.bias ? as_float(*conv.bias) : std::vector<float>(scale.size(), 0.0f);
  for (size_t k = 0; k < scale.size(); ++k) {
    scale[k] = 1.0f / std::sqrt(scale[k] + static_cast<float>(conv.eps)) * gamma[k];
    bias[k] = (own[k] - bias[k]) * scale[k] + beta[k];
  }
  const Tensor weight = channels_last(conv.weight);
  weight_ = empty_channels_last(sizes_of(weight), weight);
  bias_ = empty_strided({weight.size(0)}, {1}, weight.scalar_type(), weight);
  by_dtype(weight.scalar_type(), [&](auto zero) {
    scale_rows<decltype(zero)>(weight, scale, weight_);
    store<decltype(zero)>(bias, bias_);
  });
  weight_ = call("mkldnn::_reorder_convolution_weight", "", weight_, padding_, stride_, dilation_, groups_,
                 std::optional<std::vector<int64_t>>(input));
}

Tensor Prepared::operator()(const Tensor& x, const OptionalTensor& residual, bool into_residual) const {
  const std::vector<int64_t> no_scalars;
  const std::optional<std::string> none;
  const OptionalTensor bias = bias_;
  if (!residual) {
    return call("mkldnn::_convolution_pointwise", "", x, weight_, bias, padding_, stride_, dilation_, groups_,
                std::string("none"), no_scalars, none);
  }
  // A sum of one channel, or else of one pixel, may be of either memory format: torch 2.11 fails to make a new one.
  const bool either = (residual->size(1) == 1) != (residual->size(2) * residual->size(3) == 1);
  if (into_residual || either) {
    const Tensor sum = into_residual ? *residual : torch::stable::clone(*residual);
    return call("mkldnn::_convolution_pointwise_", "binary", sum, x, weight_, bias, padding_, stride_, dilation_,
                groups_, std::string("add"), none, none, no_scalars, none);
  }
  return call("mkldnn::_convolution_pointwise", "binary", x, *residual, weight_, bias, padding_, stride_, dilation_,
              groups_, std::string("add"), none, none, no_scalars, none);
}

int64_t sub_batch(int64_t n, int64_t bytes_per_image) {
  const int64_t limit = std::max<int64_t>(1, std::min(n, kSubBatchBytes / std::max<int64_t>(bytes_per_image, 1)));
  for (int64_t size = limit; size > limit / 2; --size) {
    if (n % size == 0) return size;
  }
  return limit;
}

void relu_into(Tensor& out, int64_t at, const Tensor& y) {
  Tensor zero = empty_strided({1}, {1}, y.scalar_type(), y);
  torch::stable::zero_(zero);
  const Tensor part = torch::stable::narrow(out, 0, at, y.size(0));
  call("aten::maximum", "out", y, zero, part);  // keeps NaN, in one pass
}

Tensor run(const Tensor& given, const ConvBN& conv, const OptionalTensor& residual, bool relu) {
  Tensor x = channels_last(given);
  OptionalTensor addend;
  if (residual) addend = channels_last(*residual);
  const std::vector<int64_t> sizes = conv.output_sizes(sizes_of(x));
  const int64_t n = sizes[0];
  const auto bytes = static_cast<int64_t>(x.element_size()) * sizes[1] * sizes[2] * sizes[3];
  const int64_t size = relu ? sub_batch(n, bytes) : n;
  std::vector<int64_t> input = sizes_of(x);
  input[0] = size;
  const Prepared convolve(conv, input);
  if (size == n) {
    const Tensor y = convolve(x, addend);
    return relu ? relu_(y) : y;
  }
  Tensor out = empty_channels_last(sizes, x);
  for (int64_t at = 0; at < n; at += size) {
    const int64_t count = std::min(size, n - at);
    OptionalTensor part;
    if (addend) part = torch::stable::narrow(*addend, 0, at, count);
    relu_into(out, at, convolve(torch::stable::narrow(x, 0, at, count), part));
  }
  return out;
}

}  // namespace rf::onednn
