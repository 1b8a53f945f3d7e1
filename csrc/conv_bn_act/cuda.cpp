// resnet_fused_cuda::conv_bn_act: checks, lays out, plans and launches.
#include "conv_bn_act/cuda.h"

#include "common/device.h"
#include "common/operands.h"
#include "common/plans.h"
#include "conv_bn_act/ops.h"

namespace rf::conv {

namespace {

std::optional<Element> element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return Element::kBF16;
    case ScalarType::Half:
      return Element::kFP16;
    case ScalarType::Float:
      return Element::kFP32;
    default:
      return std::nullopt;
  }
}

void launch(const Plan& plan, void* stream) {
  const KernelInfo& kernel = info(plan.kernel);
#define RF_CONV_LAUNCH_PART(name, T, E, P) \
  if (kernel.element == E && kernel.precision == P) return launch_##name(plan, stream);
  RF_CONV_PARTS(RF_CONV_LAUNCH_PART)
#undef RF_CONV_LAUNCH_PART
}

// The plan for a sound call into `out`, whose pixels are dense; `operands` holds what had to be copied.
Plan planned(const Tensor& x, const ConvBN& conv, const OptionalTensor& residual, bool relu, bool tf32,
             const Choice& choice, const Tensor& out, Operands& operands) {
  const std::optional<Element> element = element_of(x.scalar_type());
  STD_TORCH_CHECK(element, "x: need bfloat16, float16 or float32");
  Args args{};
  const char* refused = set_sizes(args, x.sizes().data(), conv.weight.sizes().data(), conv.stride.data(),
                                  conv.padding.data(), conv.dilation.data(), conv.groups);
  STD_TORCH_CHECK(!refused, "conv_bn_act by cuda: ", refused);
  const Tensor input = operands.keep(channels_adjacent(x) ? x : channels_last(x));
  args.x = input.data_ptr();
  args.x_stride_n = input.stride(0), args.x_stride_h = input.stride(2), args.x_stride_w = input.stride(3);
  args.weight = operands.keep(dense_channels_last(conv.weight) ? conv.weight : channels_last(conv.weight)).data_ptr();
  args.bias = operands.vector(conv.bias, kWideBias, args.wide);
  args.gamma = operands.vector(conv.gamma, kWideGamma, args.wide);
  args.beta = operands.vector(conv.beta, kWideBeta, args.wide);
  args.mean = operands.vector(conv.mean, kWideMean, args.wide);
  args.var = operands.vector(conv.var, kWideVar, args.wide);
  if (residual) {
    const Tensor addend = operands.keep(pixel_stride(*residual) ? *residual : channels_last(*residual));
    args.residual = addend.data_ptr();
    args.residual_stride = *pixel_stride(addend);
  }
  args.out = out.data_ptr();
  args.out_stride = conv.weight.size(0);
  args.eps = static_cast<float>(conv.eps);
  args.relu = relu;

  const Plan plan = make_plan(args, *element, tf32 ? Precision::kTensorCore : Precision::kIeee, multiprocessors(x.get_device_index()), choice);
  STD_TORCH_CHECK(!plan.refusal, "conv_bn_act by cuda: ", plan.refusal);
  return plan;
}

Choice choice_of(const std::string& kernel, int64_t splits) {
  const Choice choice{kernel_named(kernel.c_str()), static_cast<int>(splits)};
  STD_TORCH_CHECK(kernel.empty() || choice.kernel != Kernel::kCount, "kernel: there is none called '", kernel, "'");
  return choice;
}

}  // namespace

const char* refusal_of(const Tensor& x, const ConvBN& conv) {
  const std::optional<Element> element = element_of(x.scalar_type());
  if (!element) return "its kernels compute bfloat16, float16 and float32";
  if (capability(x.get_device_index()) < 80) return "it needs compute capability 8.0";
  Args args{};
  const char* refused = set_sizes(args, x.sizes().data(), conv.weight.sizes().data(), conv.stride.data(),
                                  conv.padding.data(), conv.dilation.data(), conv.groups);
  args.x = args.weight = args.mean = args.var = args.out = x.data_ptr();
  return refused ? refused : refusal(args, *element);
}

Tensor run_cuda(const Tensor& x, const ConvBN& conv, const OptionalTensor& residual, bool relu, bool tf32,
                const std::string& kernel, int64_t splits) {
  check_input(x);
  const std::vector<int64_t> out_sizes = check_conv(x, conv, sizes_of(x));
  if (residual) check_addend(*residual, out_sizes, x, "residual");
  const Choice choice = choice_of(kernel, splits);
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = empty_channels_last(out_sizes, x);
  if (out.numel() == 0) return out;

  Operands operands;
  Plan plan = planned(x, conv, residual, relu, tf32, choice, out, operands);
  if (plan.workspace_bytes > 0) {
    const auto count = static_cast<int64_t>(plan.workspace_bytes / sizeof(float));
    plan.args.workspace =
        static_cast<float*>(operands.keep(empty_strided({count}, {1}, ScalarType::Float, x)).data_ptr());
  }
  launch(plan, current_stream(device));
  return out;
}

namespace {

// Writes the plan of a call into `out` and `workspace` to `bytes`; gives the bytes of workspace that it needs. Nothing
// is copied: what the kernels cannot read where it lies is refused.
int64_t write_plan(const Tensor& x, const ConvBN& conv, const OptionalTensor& residual, bool relu, bool tf32,
                   const Choice& choice, const Tensor& out, const OptionalTensor& workspace, const Tensor& bytes) {
  check_input(x);
  const std::vector<int64_t> out_sizes = check_conv(x, conv, sizes_of(x));
  if (residual) check_addend(*residual, out_sizes, x, "residual");
  check_addend(out, out_sizes, x, "out");
  STD_TORCH_CHECK(dense_channels_last(out), "out: need channels_last without gaps");
  STD_TORCH_CHECK(channels_adjacent(x), "x: need adjacent channels");
  STD_TORCH_CHECK(dense_channels_last(conv.weight), "weight: need channels_last without gaps");
  STD_TORCH_CHECK(!residual || pixel_stride(*residual), "residual: need channels_last");
  for (const OptionalTensor& vector : {conv.bias, conv.gamma, conv.beta, OptionalTensor(conv.mean), OptionalTensor(conv.var)}) {
    STD_TORCH_CHECK(!vector || vector->size(0) <= 1 || vector->stride(0) == 1, "batch norm: need vectors without gaps");
  }
  Operands operands;
  Plan plan = planned(x, conv, residual, relu, tf32, choice, out, operands);
  if (workspace) {
    const auto room = static_cast<size_t>(workspace->numel() * workspace->element_size());
    STD_TORCH_CHECK(room >= plan.workspace_bytes && workspace->device() == x.device(), "workspace: need ",
                    plan.workspace_bytes, " bytes on x's device");
    plan.args.workspace = static_cast<float*>(workspace->data_ptr());
  }
  put_plan(bytes, plan);
  return static_cast<int64_t>(plan.workspace_bytes);
}

void boxed_plan(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const ConvBN conv = read_conv(arguments);
  const OptionalTensor residual = arguments.optional_tensor();
  const auto relu = arguments.read<bool>(), tf32 = arguments.read<bool>();
  const std::string kernel = arguments.text();
  const auto splits = arguments.read<int64_t>();
  const Tensor out = arguments.tensor();
  const OptionalTensor workspace = arguments.optional_tensor();
  const Tensor plan = arguments.tensor();
  stack[0] = torch::stable::detail::from(
      write_plan(x, conv, residual, relu, tf32, choice_of(kernel, splits), out, workspace, plan));
}

void boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const ConvBN conv = read_conv(arguments);
  const OptionalTensor residual = arguments.optional_tensor();
  const auto relu = arguments.read<bool>(), tf32 = arguments.read<bool>();
  const std::string kernel = arguments.text();
  const auto splits = arguments.read<int64_t>();
  give(stack, run_cuda(x, conv, residual, relu, tf32, kernel, splits));
}

}  // namespace

}  // namespace rf::conv

// Launches a plan that resnet_fused_cuda::conv_bn_act_plan wrote, on the current device; gives null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* resnet_fused_launch_conv_bn_act(const rf::conv::Plan* plan,
                                                                                             void* stream) {
  if (plan->workspace_bytes > 0 && !plan->args.workspace) return "the plan has no workspace";
  return rf::launched([&] { rf::conv::launch(*plan, stream); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def(
      "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor running_mean, "
      "Tensor running_var, float eps, int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? residual, "
      "bool relu, bool tf32, str kernel='', int splits=0) -> Tensor");
  m.def(
      "conv_bn_act_plan(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor running_mean, "
      "Tensor running_var, float eps, int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? residual, "
      "bool relu, bool tf32, str kernel, int splits, Tensor(a!) out, Tensor? workspace, Tensor(b!) plan) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) {
  m.impl("conv_bn_act", &rf::conv::boxed);
  m.impl("conv_bn_act_plan", &rf::conv::boxed_plan);
}
