#include "common/conv_bn.h"

namespace rf {

namespace {

bool same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

std::string text(const std::vector<int64_t>& sizes) {
  std::string result = "[";
  for (const int64_t size : sizes) result += (result.size() > 1 ? ", " : "") + std::to_string(size);
  return result + "]";
}

void check_pair(const Pair& pair, int64_t least, const std::string& name) {
  STD_TORCH_CHECK(pair[0] >= least && pair[1] >= least, name, ": got (", pair[0], ", ", pair[1],
                  "), need two integers of at least ", least);
}

void check_vector(const Tensor& vector, int64_t channels, const Tensor& x, const std::string& name) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == channels, name, ": got shape ", shape_text(vector), ", need [",
                  channels, "]");
  const bool wide = vector.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double;
  STD_TORCH_CHECK(vector.scalar_type() == x.scalar_type() || wide, name, ": need the dtype of x or float32");
  STD_TORCH_CHECK(same_device(vector, x), name, ": need the device of x");
}

}  // namespace

std::vector<int64_t> ConvBN::output_sizes(const std::vector<int64_t>& x) const {
  std::vector<int64_t> sizes{x[0], weight.size(0)};
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = dilation[i] * (weight.size(2 + i) - 1) + 1;
    const int64_t room = x[2 + i] + 2 * padding[i] - reach;
    sizes.push_back(room < 0 ? 0 : room / stride[i] + 1);
  }
  return sizes;
}

std::optional<ConvBN> read_optional_conv(Arguments& arguments) {
  std::array<OptionalTensor, 6> tensors;
  for (OptionalTensor& tensor : tensors) tensor = arguments.optional_tensor();
  const auto eps = arguments.read<double>();
  const Pair stride = arguments.pair(), padding = arguments.pair(), dilation = arguments.pair();
  const auto groups = arguments.read<int64_t>();
  if (!tensors[0]) return std::nullopt;
  STD_TORCH_CHECK(tensors[4] && tensors[5], "running_mean, running_var: got None, need the statistics");
  return ConvBN{*tensors[0], tensors[1], tensors[2], tensors[3], *tensors[4], *tensors[5],
                eps,         stride,     padding,    dilation,   groups};
}

ConvBN read_conv(Arguments& arguments) {
  Tensor weight = arguments.tensor();
  OptionalTensor bias = arguments.optional_tensor(), gamma = arguments.optional_tensor(),
                 beta = arguments.optional_tensor();
  Tensor mean = arguments.tensor(), var = arguments.tensor();
  const auto eps = arguments.read<double>();
  const Pair stride = arguments.pair(), padding = arguments.pair(), dilation = arguments.pair();
  const auto groups = arguments.read<int64_t>();
  return {weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation, groups};
}

void check_input(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x: got shape ", shape_text(x), ", need 4 dimensions [N, C, H, W]");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  "x: need a floating-point dtype");
}

std::vector<int64_t> check_conv(const Tensor& x, const ConvBN& conv, const std::vector<int64_t>& input,
                                const std::string& name) {
  const std::string at = name.empty() ? "" : name + ".";
  const Tensor& weight = conv.weight;
  STD_TORCH_CHECK(weight.dim() == 4, at, "weight: got shape ", shape_text(weight),
                  ", need 4 dimensions [K, C/groups, R, S]");
  check_pair(conv.stride, 1, at + "stride");
  check_pair(conv.padding, 0, at + "padding");
  check_pair(conv.dilation, 1, at + "dilation");
  STD_TORCH_CHECK(conv.groups >= 1 && weight.size(0) % conv.groups == 0, at, "groups: got ", conv.groups,
                  ", need a divisor of the ", weight.size(0), " output channels");
  STD_TORCH_CHECK(input[1] == weight.size(1) * conv.groups, at, "weight: the input has ", input[1], " channels, a weight of ",
                  shape_text(weight), " with groups=", conv.groups, " needs ", weight.size(1) * conv.groups);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), at, "weight: need the dtype of x");
  STD_TORCH_CHECK(same_device(weight, x), at, "weight: need the device of x");
  const std::vector<int64_t> sizes = conv.output_sizes(input);
  STD_TORCH_CHECK(sizes[2] >= 1 && sizes[3] >= 1, "x: got an image of ", input[2], "x", input[3], ", too small for ", at,
                  "weight of shape ", shape_text(weight));
  const int64_t channels = weight.size(0);
  if (conv.bias) check_vector(*conv.bias, channels, x, at + "bias");
  if (conv.gamma) check_vector(*conv.gamma, channels, x, at + "bn_weight");
  if (conv.beta) check_vector(*conv.beta, channels, x, at + "bn_bias");
  check_vector(conv.mean, channels, x, at + "running_mean");
  check_vector(conv.var, channels, x, at + "running_var");
  return sizes;
}

void check_addend(const Tensor& addend, const std::vector<int64_t>& sizes, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(sizes_of(addend) == sizes, name, ": got shape ", shape_text(addend), ", need the output's ", text(sizes));
  STD_TORCH_CHECK(addend.scalar_type() == x.scalar_type(), name, ": need the dtype of x");
  STD_TORCH_CHECK(same_device(addend, x), name, ": need the device of x");
}

}  // namespace rf
