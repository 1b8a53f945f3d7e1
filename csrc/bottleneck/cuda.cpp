// resnet_fused_cuda::bottleneck: checks, lays out, plans and launches.
#include "bottleneck/cuda.h"

#include "bottleneck/ops.h"
#include "common/device.h"
#include "common/operands.h"
#include "common/plans.h"

#include "schemas.h"

namespace rf::bottleneck {

namespace {

std::optional<Element> element_of(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return Element::kBF16;
  if (dtype == ScalarType::Half) return Element::kFP16;
  return std::nullopt;
}

ConvShape sizes_of_conv(const ConvBN& conv) {
  const auto sizes = conv.weight.sizes();
  return {{sizes[0], sizes[1], sizes[2], sizes[3]}, conv.stride, conv.padding, conv.dilation, conv.groups};
}

const char* shape_of(const rf::Block& block, Shape& shape) {
  if (block.identity) return "its whole-block kernels add x or a projection of x, no other tensor";
  const std::optional<Element> element = element_of(block.x.scalar_type());
  if (!element) return "its whole-block kernels compute bfloat16 and float16";
  const ConvShape convs[3] = {sizes_of_conv(block.convs[0]), sizes_of_conv(block.convs[1]),
                              sizes_of_conv(block.convs[2])};
  const ConvShape shortcut = block.shortcut ? sizes_of_conv(*block.shortcut) : ConvShape{};
  shape.element = *element;
  return read_shape(shape, block.x.size(1), convs, block.shortcut ? &shortcut : nullptr);
}

Sizes sizes_of_input(const Tensor& x) { return {x.size(0), x.size(2), x.size(3)}; }

Limits limits_of(int device) {
  return {multiprocessors(device), shared_per_block(device), shared_per_multiprocessor(device)};
}

Tensor copy_channels_last(const Tensor& tensor) {
  Tensor copy = empty_channels_last(sizes_of(tensor), tensor);
  return torch::stable::copy_(copy, tensor);
}

Conv operand(Operands& operands, const ConvBN& conv) {
  Conv result{};
  const bool fits = dense_channels_last(conv.weight) && aligned(conv.weight.data_ptr());
  result.weight = operands.keep(fits ? conv.weight : copy_channels_last(conv.weight)).data_ptr();
  result.bias = operands.vector(conv.bias, kWideBias, result.wide);
  result.gamma = operands.vector(conv.gamma, kWideGamma, result.wide);
  result.beta = operands.vector(conv.beta, kWideBeta, result.wide);
  result.mean = operands.vector(conv.mean, kWideMean, result.wide);
  result.var = operands.vector(conv.var, kWideVar, result.wide);
  result.eps = static_cast<float>(conv.eps);
  return result;
}

// The stride of a dimension of size one means nothing.
int64_t stride_of(const Tensor& tensor, int dim) { return tensor.size(dim) > 1 ? tensor.stride(dim) : 0; }

bool takes(const Tensor& x) {
  if (!channels_adjacent(x) || !aligned(x.data_ptr())) return false;
  return stride_of(x, 0) % 8 == 0 && stride_of(x, 2) % 8 == 0 && stride_of(x, 3) % 8 == 0;
}

// The plan for x, as the kernels take it, into `out`; `operands` holds what had to be copied.
Plan planned(const rf::Block& block, const Shape& shape, Kernel choice, const Tensor& x, const Tensor& out,
             Operands& operands) {
  Args args{};
  args.x = x.data_ptr();
  args.x_stride_n = stride_of(x, 0), args.x_stride_h = stride_of(x, 2), args.x_stride_w = stride_of(x, 3);
  args.out = out.data_ptr();
  args.n = static_cast<int>(x.size(0)), args.h = static_cast<int>(x.size(2)), args.w = static_cast<int>(x.size(3));
  args.conv1 = operand(operands, block.convs[0]);
  args.conv2 = operand(operands, block.convs[1]);
  args.conv3 = operand(operands, block.convs[2]);
  if (block.shortcut) args.shortcut = operand(operands, *block.shortcut);

  const Plan plan = make_plan(args, shape, limits_of(x.get_device_index()), choice);
  STD_TORCH_CHECK(!plan.refusal, "bottleneck by cuda: ", plan.refusal);
  return plan;
}

void launch(const Plan& plan, void* stream) {
  info(plan.kernel).element == Element::kBF16 ? launch_bf16(plan, stream) : launch_fp16(plan, stream);
}

Kernel choice_of(const std::string& kernel) {
  const Kernel choice = kernel_named(kernel.c_str());
  STD_TORCH_CHECK(kernel.empty() || choice != Kernel::kCount, "kernel: there is none called '", kernel, "'");
  return choice;
}

}  // namespace

const char* refusal_of(const rf::Block& block) {
  Shape shape{};
  const char* refused = shape_of(block, shape);
  const int device = block.x.get_device_index();
  if (!refused && capability(device) < 80) refused = "it needs compute capability 8.0";
  if (!refused) refused = sizes_refusal(sizes_of_input(block.x));
  if (!refused) kernel_for(shape, sizes_of_input(block.x), limits_of(device), &refused);
  return refused;
}

Tensor run_cuda(const rf::Block& block, const std::string& kernel) {
  const std::vector<int64_t> out_sizes = check_block(block);
  const Kernel choice = choice_of(kernel);
  Shape shape{};
  const char* refused = shape_of(block, shape);
  STD_TORCH_CHECK(!refused, "bottleneck by cuda: ", refused);

  const int device = block.x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = empty_channels_last(out_sizes, block.x);
  if (out.numel() == 0) return out;
  refused = sizes_refusal(sizes_of_input(block.x));
  STD_TORCH_CHECK(!refused, "bottleneck by cuda: ", refused);

  Operands operands;
  const Tensor x = operands.keep(takes(block.x) ? block.x : copy_channels_last(block.x));
  const Plan plan = planned(block, shape, choice, x, out, operands);
  void* stream = current_stream(device);
  launch(plan, stream);
  return out;
}

namespace {

// Writes the plan of a call into `out` to `bytes`. Nothing is copied: what the kernel cannot read where it lies is
// refused.
void write_plan(const rf::Block& block, Kernel choice, const Tensor& out, const Tensor& bytes) {
  const std::vector<int64_t> out_sizes = check_block(block);
  check_addend(out, out_sizes, block.x, "out");
  STD_TORCH_CHECK(dense_channels_last(out), "out: need channels_last without gaps");
  STD_TORCH_CHECK(takes(block.x), "x: need adjacent channels and pixels aligned to 16 bytes");
  Shape shape{};
  const char* refused = shape_of(block, shape);
  STD_TORCH_CHECK(!refused, "bottleneck by cuda: ", refused);
  for (const ConvBN* conv : {&block.convs[0], &block.convs[1], &block.convs[2], block.shortcut ? &*block.shortcut : nullptr}) {
    if (!conv) continue;
    STD_TORCH_CHECK(dense_channels_last(conv->weight) && aligned(conv->weight.data_ptr()),
                    "weight: need channels_last without gaps, aligned to 16 bytes");
    for (const OptionalTensor& vector :
         {conv->bias, conv->gamma, conv->beta, OptionalTensor(conv->mean), OptionalTensor(conv->var)}) {
      STD_TORCH_CHECK(!vector || vector->size(0) <= 1 || vector->stride(0) == 1, "batch norm: need vectors without gaps");
    }
  }
  Operands operands;
  put_plan(bytes, planned(block, shape, choice, block.x, out, operands));
}

void boxed_plan(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const rf::Block block = read_block(arguments, 3);
  const std::string kernel = arguments.text();
  const Tensor out = arguments.tensor(), plan = arguments.tensor();
  write_plan(block, choice_of(kernel), out, plan);
  stack[0] = torch::stable::detail::from(int64_t{0});
}

void boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const rf::Block block = read_block(arguments, 3);
  const std::string kernel = arguments.text();
  give(stack, run_cuda(block, kernel));
}

// The public op's schema, with other arguments in the place of the backend's, and another name and result.
std::string schema(const std::string& name, const std::string& arguments, const std::string& result) {
  const std::string begin = "bottleneck(", backend = "str backend", arrow = "-> ";
  for (std::string text : kSchemas) {
    if (!text.starts_with(begin)) continue;
    text.replace(text.find(arrow) + arrow.size(), std::string::npos, result);
    text.replace(text.find(backend), backend.size(), arguments);
    return name + text.substr(begin.size() - 1);
  }
  return "";
}

}  // namespace

}  // namespace rf::bottleneck

// Launches a plan that resnet_fused_cuda::bottleneck_plan wrote, on the current device; gives null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* resnet_fused_launch_bottleneck(
    const rf::bottleneck::Plan* plan, void* stream) {
  return rf::launched([&] { rf::bottleneck::launch(*plan, stream); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  using rf::bottleneck::schema;
  m.def(schema("bottleneck", "str kernel=''", "Tensor").c_str());
  m.def(schema("bottleneck_plan", "str kernel, Tensor(a!) out, Tensor(b!) plan", "int").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) {
  m.impl("bottleneck", &rf::bottleneck::boxed);
  m.impl("bottleneck_plan", &rf::bottleneck::boxed_plan);
}
