#include "conv_bn_act/cpu.h"

#include <cmath>
#include <cstring>

#include "conv_bn_act/direct.h"
#include "conv_bn_act/instructions.h"
#include "conv_bn_act/winograd.h"

namespace rf::cpu {

namespace {

constexpr size_t kGeometry = 9;  // integers of a convolution

bool dense(const Tensor& t) {
  const int64_t c = t.size(1), w = t.size(3) * c;
  return (c < 2 || t.stride(1) == 1) && (t.size(3) < 2 || t.stride(3) == c) && (t.size(2) < 2 || t.stride(2) == w) &&
         (t.size(0) < 2 || t.stride(0) == t.size(2) * w);
}

void check_tensor(const Tensor& t, const char* name, ScalarType dtype, int64_t dimensions) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.dim() == dimensions, name, ": got ", shape_text(t),
                  ", need ", dimensions, " dimensions of the right dtype on the CPU");
  STD_TORCH_CHECK(dimensions == 4 ? dense(t) : t.is_contiguous(), name, ": its elements are not adjacent");
}

void check_vector(const Tensor& t, const char* name, int64_t length) {
  check_tensor(t, name, ScalarType::Float, 1);
  STD_TORCH_CHECK(t.numel() == length, name, ": got ", shape_text(t));
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

Convolution read_one(const std::vector<Tensor>& packed, size_t at, const std::vector<int64_t>& geometry) {
  const auto pair = [&](size_t i) { return Pair{geometry[i], geometry[i + 1]}; };
  const size_t g = at * kGeometry;
  return {static_cast<Method>(geometry[g]), packed[3 * at], packed[3 * at + 1], packed[3 * at + 2],
          pair(g + 1), pair(g + 3), pair(g + 5), pair(g + 7)};
}

winograd::Problem winograd_problem(const Convolution& conv, const Tensor& x, const OptionalTensor& residual, bool relu,
                                   const Tensor& out) {
  return {x.data_ptr(),
          conv.filters.data_ptr(),
          pointer<const float>(conv.scale),
          pointer<const float>(conv.bias),
          residual ? residual->data_ptr() : nullptr,
          out.data_ptr(),
          x.size(0), x.size(2), x.size(3), x.size(1), out.size(2), out.size(3), out.size(1),
          conv.padding[0], conv.padding[1],
          relu};
}

direct::Order order_of(const Convolution& conv) {
  if (conv.method == Method::kDirect) return direct::Order::kPacked;
  return dense(conv.filters) ? direct::Order::kChannelsLast : direct::Order::kContiguous;
}

direct::Problem direct_problem(const Convolution& conv, const Tensor& x, const OptionalTensor& residual, bool relu,
                               const Tensor& out) {
  return {x.data_ptr(),
          conv.filters.data_ptr(),
          order_of(conv),
          pointer<const float>(conv.scale),
          pointer<const float>(conv.bias),
          residual ? residual->data_ptr() : nullptr,
          out.data_ptr(),
          x.size(0), x.size(2), x.size(3), x.size(1), out.size(2), out.size(3), out.size(1),
          conv.kernel[0], conv.kernel[1], conv.stride[0], conv.stride[1],
          conv.padding[0], conv.padding[1], conv.dilation[0], conv.dilation[1],
          relu};
}

void check_residual(const OptionalTensor& residual, ScalarType dtype, const std::vector<int64_t>& want) {
  if (!residual) return;
  check_tensor(*residual, "residual", dtype, 4);
  for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(residual->size(d) == want[d], "residual: got ", shape_text(*residual));
}

// Of a weight that is not packed.
void check_weight(const Tensor& weight, ScalarType dtype, const std::array<int64_t, 4>& want) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == dtype && weight.dim() == 4, "filters: got ",
                  shape_text(weight), ", need four dimensions of x's dtype on the CPU");
  for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(weight.size(d) == want[d], "filters: got ", shape_text(weight));
  STD_TORCH_CHECK(weight.is_contiguous() || dense(weight), "filters: need a contiguous or channels_last weight");
}

// Raises what does not fit, naming the argument.
void check(const Convolution& conv, const Tensor& x, const OptionalTensor& residual, const Tensor& out) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: need float32 or bfloat16");
  check_tensor(x, "x", dtype, 4);
  check_tensor(out, "out", dtype, 4);
  for (const int axis : {0, 1}) {
    STD_TORCH_CHECK(conv.kernel[axis] > 0 && conv.stride[axis] > 0 && conv.padding[axis] >= 0 && conv.dilation[axis] > 0,
                    "geometry: need sizes above 0");
    STD_TORCH_CHECK(x.size(2 + axis) + 2 * conv.padding[axis] > conv.dilation[axis] * (conv.kernel[axis] - 1),
                    "x: got ", shape_text(x), ", smaller than the filter");
  }
  const std::vector<int64_t> want = conv.output_sizes({x.size(0), x.size(1), x.size(2), x.size(3)});
  const int64_t channels = x.size(1), out_channels = want[1];
  for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(out.size(d) == want[d], "out: got ", shape_text(out));
  STD_TORCH_CHECK(out_channels % direct::kPanel == 0, "out: need channels in 32s");
  check_vector(conv.scale, "scale", out_channels);
  check_vector(conv.bias, "bias", out_channels);
  if (conv.method == Method::kUnpacked) {
    const Tensor& weight = conv.filters;
    check_weight(weight, dtype, {out_channels, channels, conv.kernel[0], conv.kernel[1]});
    return check_residual(residual, dtype, want);
  }
  int64_t elements = 0;
  if (conv.method == Method::kWinograd) {
    STD_TORCH_CHECK(channels % 16 == 0, "x: need channels in 16s");
    const bool right = conv.kernel == Pair{3, 3} && conv.stride == Pair{1, 1} && conv.dilation == Pair{1, 1};
    STD_TORCH_CHECK(right, "geometry: need 3x3, stride and dilation 1");
    elements = 16 * channels * out_channels;
  } else {
    STD_TORCH_CHECK(conv.method == Method::kDirect, "geometry: there is no such method");
    const int64_t depth = conv.kernel[0] * conv.kernel[1] * channels;
    elements = (dtype == ScalarType::Float ? depth : (depth + 1) / 2 * 2) * out_channels;
  }
  STD_TORCH_CHECK(conv.filters.is_cpu() && conv.filters.scalar_type() == dtype && conv.filters.is_contiguous() &&
                      conv.filters.numel() == elements,
                  "filters: got ", shape_text(conv.filters), ", need ", elements, " elements of x's dtype");
  check_residual(residual, dtype, want);
}

}  // namespace

std::vector<Convolution> read(const std::vector<Tensor>& packed, const std::vector<int64_t>& geometry) {
  const size_t count = packed.size() / 3;
  STD_TORCH_CHECK(count > 0 && packed.size() == 3 * count && geometry.size() == kGeometry * count,
                  "packed: got ", packed.size(), " tensors and ", geometry.size(), " integers, need 3 and ", kGeometry,
                  " for every convolution");
  std::vector<Convolution> convs;
  for (size_t i = 0; i < count; ++i) convs.push_back(read_one(packed, i, geometry));
  return convs;
}

std::vector<int64_t> Convolution::output_sizes(const std::vector<int64_t>& x) const {
  const auto size = [&](int axis) {
    return (x[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  };
  return {x[0], scale.numel(), size(0), size(1)};
}

bool convolve(const Convolution& conv, const Tensor& x, const OptionalTensor& residual, bool relu, const Tensor& out,
              const std::string& isa) {
  check(conv, x, residual, out);
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(instructions(bf16, isa) != Instructions::kNone,
                  "isa: this CPU lacks ", !isa.empty() ? isa : bf16 ? "AVX512_BF16" : "AVX2");
  if (conv.method == Method::kWinograd) {
    return winograd::convolve(winograd_problem(conv, x, residual, relu, out), bf16, *winograd::kernel(bf16, isa));
  }
  const bool pads = conv.padding != Pair{0, 0};
  return direct::convolve(direct_problem(conv, x, residual, relu, out), bf16, direct::kernel(bf16, isa)) || !pads;
}

namespace {

// [K/32, 16, C, 32] from [K, C, 3, 3].
Tensor winograd_filters(const Tensor& weight) {
  constexpr int64_t kPanel = winograd::kPanel;
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Float && weight.dim() == 4 &&
                      weight.size(1) % 16 == 0 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.size(0) % kPanel == 0 && (weight.is_contiguous() || dense(weight)),
                  "weight: got ", shape_text(weight),
                  ", need float32 [K, C, 3, 3], contiguous or channels_last, with K in 32s and C in 16s");
  const int64_t channels = weight.size(1), panels = weight.size(0) / kPanel;
  const Tensor filters = torch::stable::empty({panels, 16, channels, kPanel}, ScalarType::Float);
  const winograd::Kernel* const kernel = winograd::kernel(false, "");
  STD_TORCH_CHECK(kernel, "isa: this CPU lacks AVX2");
  const int64_t blocks = channels / kernel->lanes;
  torch::stable::parallel_for(0, panels * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      kernel->filters(pointer<const float>(weight), !dense(weight), channels, item / blocks,
                      item % blocks * kernel->lanes, pointer<float>(filters));
    }
  });
  return filters;
}

double number(const Tensor& t, int64_t i) {
  const void* const at = t.data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return static_cast<const double*>(at)[i * t.stride(0)];
    case ScalarType::Float:
      return static_cast<const float*>(at)[i * t.stride(0)];
    default: {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(at)[i * t.stride(0)]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
  }
}

// float32 [2, K]: what batch norm and the convolution's bias multiply the sums with and add to them, found in double.
Tensor affine(const OptionalTensor& bias, const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& mean,
              const Tensor& variance, double eps) {
  const int64_t channels = mean.dim() == 1 ? mean.size(0) : -1;
  for (const OptionalTensor& t : {bias, gamma, beta, OptionalTensor(mean), OptionalTensor(variance)}) {
    if (!t) continue;
    const ScalarType dtype = t->scalar_type();
    const bool known = dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16;
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == channels && known, "vectors: got ", shape_text(*t),
                    ", need [K] of float64, float32 or bfloat16 on the CPU");
  }
  const Tensor out = torch::stable::empty({2, channels}, ScalarType::Float);
  float* const scale = pointer<float>(out);
  for (int64_t i = 0; i < channels; ++i) {
    const double factor = (gamma ? number(*gamma, i) : 1.0) / std::sqrt(number(variance, i) + eps);
    const double offset = ((bias ? number(*bias, i) : 0.0) - number(mean, i)) * factor;
    scale[i] = static_cast<float>(factor);
    scale[channels + i] = static_cast<float>(offset + (beta ? number(*beta, i) : 0.0));
  }
  return out;
}

std::string instructions_name(bool bf16) {
  const char* const name = version<const char>(instructions(bf16, ""), "avx512bf16", "avx512", "avx2");
  return name ? name : "";
}

void boxed_filters(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  give(stack, winograd_filters(arguments.tensor()));
}

void boxed_affine(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const OptionalTensor bias = arguments.optional_tensor(), gamma = arguments.optional_tensor();
  const OptionalTensor beta = arguments.optional_tensor();
  const Tensor mean = arguments.tensor(), variance = arguments.tensor();
  give(stack, affine(bias, gamma, beta, mean, variance, arguments.read<double>()));
}

void boxed_conv(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const auto packed = arguments.read<std::vector<Tensor>>();
  const auto geometry = arguments.read<std::vector<int64_t>>();
  const OptionalTensor residual = arguments.optional_tensor();
  const bool relu = arguments.read<bool>();
  const Tensor out = arguments.tensor();
  const std::string isa = arguments.text();
  const std::vector<Convolution> convs = read(packed, geometry);
  STD_TORCH_CHECK(convs.size() == 1, "packed: need one convolution");
  stack[0] = torch::stable::detail::from(convolve(convs[0], x, residual, relu, out, isa));
}

void boxed_instructions(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  stack[0] = torch::stable::detail::from(instructions_name(arguments.read<bool>()));
}

}  // namespace

}  // namespace rf::cpu

// packed holds filters, scale and bias of every convolution, geometry its integers (see cpu.h). The answer is that of
// rf::cpu::convolve.
STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "conv_bn_act(Tensor x, Tensor[] packed, int[] geometry, Tensor? residual, bool relu, Tensor(a!) out, str isa='') "
      "-> bool");
  m.def("winograd_filters(Tensor weight) -> Tensor");
  m.def("affine(Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor variance, float eps) -> Tensor");
  m.def("instructions(bool bf16=False) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("conv_bn_act", &rf::cpu::boxed_conv);
  m.impl("affine", &rf::cpu::boxed_affine);
  m.impl("winograd_filters", &rf::cpu::boxed_filters);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  m.impl("instructions", &rf::cpu::boxed_instructions);
}
