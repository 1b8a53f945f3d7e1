// resnet_fused_cuda::batch_norm_act, batch_norm_act_apply and batch_norm_act_backward: check, lay out, plan and launch.
#include "batch_norm_act/cuda.h"

#include "common/conv_bn.h"
#include "common/device.h"
#include "common/operands.h"

namespace rf::norm {

namespace {

Element element_of(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
                  "x: need bfloat16, float16 or float32");
  if (dtype == ScalarType::Float) return Element::kFP32;
  return dtype == ScalarType::Half ? Element::kFP16 : Element::kBF16;
}

// One call: everything is laid out as x is, and kept until the launch.
class Problem {
 public:
  explicit Problem(const Tensor& x) : x_(x) {
    check_input(x);
    element_ = element_of(x.scalar_type());
    last_ = !x.is_contiguous();
    STD_TORCH_CHECK(!last_ || dense_channels_last(x), "x: need it dense, contiguous or channels_last");
    args_.x = x.data_ptr();
  }

  Args& args() { return args_; }

  const void* image(const OptionalTensor& tensor, const char* name) {
    if (!tensor) return nullptr;
    check_addend(*tensor, sizes_of(x_), x_, name);
    return operands_.keep(last_ ? channels_last(*tensor) : torch::stable::contiguous(*tensor)).data_ptr();
  }

  const void* vector(const OptionalTensor& tensor, const char* name, unsigned wide) {
    if (!tensor) return nullptr;
    check_vector(*tensor, name);
    return operands_.vector(*tensor, wide, args_.wide);
  }

  // One that is written: it must lie as it is.
  void* written(const OptionalTensor& tensor, const char* name, unsigned wide) {
    if (!tensor) return nullptr;
    check_vector(*tensor, name);
    STD_TORCH_CHECK(tensor->size(0) <= 1 || tensor->stride(0) == 1, name, ": need it contiguous");
    if (tensor->scalar_type() == ScalarType::Float) args_.wide |= wide;
    return tensor->data_ptr();
  }

  Tensor new_image() const {
    const auto sizes = sizes_of(x_);
    const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
    return last_ ? empty_channels_last(sizes, x_) : empty_strided(sizes, {c * h * w, h * w, w, 1}, x_.scalar_type(), x_);
  }

  Tensor new_vector() const { return empty_strided({x_.size(1)}, {1}, ScalarType::Float, x_); }

  void launch(Operation operation) {
    const int device = x_.get_device_index();
    const Shape shape{x_.size(0), x_.size(1), x_.size(2), x_.size(3), last_};
    Plan plan = make_plan(args_, shape, element_, operation, multiprocessors(device));
    STD_TORCH_CHECK(!plan.refusal, "batch_norm_act by cuda: ", plan.refusal);
    if (plan.workspace_bytes > 0) {
      const auto count = static_cast<int64_t>(plan.workspace_bytes / sizeof(float));
      const Tensor partial = operands_.keep(empty_strided({count}, {1}, ScalarType::Float, x_));
      plan.args.partial = static_cast<float*>(partial.data_ptr());
    }
    void* stream = current_stream(device);
    switch (element_) {
      case Element::kBF16:
        return launch_bf16(plan, operation, stream);
      case Element::kFP16:
        return launch_fp16(plan, operation, stream);
      case Element::kFP32:
        return launch_fp32(plan, operation, stream);
    }
  }

 private:
  void check_vector(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == x_.size(1), name, ": got shape ", shape_text(tensor),
                    ", need [", x_.size(1), "]");
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == x_.scalar_type() || dtype == ScalarType::Float, name, ": need the dtype of x or float32");
    STD_TORCH_CHECK(tensor.device() == x_.device(), name, ": need the device of x");
  }

  Tensor x_;
  bool last_;
  Element element_;
  Args args_{};
  Operands operands_;
};

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const OptionalTensor gamma = arguments.optional_tensor(), beta = arguments.optional_tensor();
  const OptionalTensor running_mean = arguments.optional_tensor(), running_var = arguments.optional_tensor();
  const OptionalTensor batches = arguments.optional_tensor(), residual = arguments.optional_tensor();
  const auto momentum = arguments.read<double>(), eps = arguments.read<double>();
  const auto relu = arguments.read<bool>();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());

  Problem problem(x);
  Args& args = problem.args();
  args.gamma = problem.vector(gamma, "weight", kWideGamma);
  args.beta = problem.vector(beta, "bias", kWideBeta);
  args.residual = problem.image(residual, "residual");
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "running_var: need both running statistics");
  args.running_mean = problem.written(running_mean, "running_mean", kWideRunningMean);
  args.running_var = problem.written(running_var, "running_var", kWideRunningVar);
  if (batches) {
    STD_TORCH_CHECK(batches->scalar_type() == ScalarType::Long && batches->numel() == 1 &&
                        batches->device() == x.device(),
                    "num_batches_tracked: need one int64 on the device of x");
    args.batches = static_cast<const int64_t*>(batches->data_ptr());
  }
  args.momentum = static_cast<float>(momentum);
  args.eps = static_cast<float>(eps);
  args.relu = relu;
  args.training = true;
  const Tensor out = problem.new_image(), mean = problem.new_vector(), scale = problem.new_vector();
  args.out = out.data_ptr();
  args.batch_mean = static_cast<float*>(mean.data_ptr());
  args.batch_scale = static_cast<float*>(scale.data_ptr());
  problem.launch(Operation::kForward);
  give(stack, out), give(stack + 1, mean), give(stack + 2, scale);
}

void apply(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const OptionalTensor gamma = arguments.optional_tensor(), beta = arguments.optional_tensor();
  const Tensor mean = arguments.tensor(), scale = arguments.tensor();
  const OptionalTensor residual = arguments.optional_tensor();
  const auto training = arguments.read<bool>();
  const auto eps = arguments.read<double>();
  const auto relu = arguments.read<bool>();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());

  Problem problem(x);
  Args& args = problem.args();
  args.gamma = problem.vector(gamma, "weight", kWideGamma);
  args.beta = problem.vector(beta, "bias", kWideBeta);
  args.mean = problem.vector(mean, "mean", kWideMean);
  args.scale = problem.vector(scale, "scale", kWideScale);
  args.residual = problem.image(residual, "residual");
  args.training = training;
  args.eps = static_cast<float>(eps);
  args.relu = relu;
  const Tensor out = problem.new_image();
  args.out = out.data_ptr();
  problem.launch(Operation::kApply);
  give(stack, out);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = arguments.tensor(), x = arguments.tensor();
  const OptionalTensor gamma = arguments.optional_tensor();
  const Tensor mean = arguments.tensor(), scale = arguments.tensor();
  const OptionalTensor output = arguments.optional_tensor();
  const auto training = arguments.read<bool>();
  const auto eps = arguments.read<double>();
  const auto need_x = arguments.read<bool>(), need_residual = arguments.read<bool>();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());

  Problem problem(x);
  Args& args = problem.args();
  args.grad = problem.image(grad, "grad");
  args.output = problem.image(output, "output");
  args.gamma = problem.vector(gamma, "weight", kWideGamma);
  args.mean = problem.vector(mean, "mean", kWideMean);
  args.scale = problem.vector(scale, "scale", kWideScale);
  args.training = training;
  args.eps = static_cast<float>(eps);
  const Tensor dgamma = problem.new_vector(), dbeta = problem.new_vector();
  args.dgamma = static_cast<float*>(dgamma.data_ptr());
  args.dbeta = static_cast<float*>(dbeta.data_ptr());
  OptionalTensor dx, dresidual;
  if (need_x) args.dx = dx.emplace(problem.new_image()).data_ptr();
  if (need_residual) args.dresidual = dresidual.emplace(problem.new_image()).data_ptr();
  problem.launch(Operation::kBackward);
  give(stack, dgamma), give(stack + 1, dbeta);
  stack[2] = torch::stable::detail::from(dx);
  stack[3] = torch::stable::detail::from(dresidual);
}

}  // namespace

}  // namespace rf::norm

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def(
      "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor? num_batches_tracked, Tensor? residual, float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  // scale: 1/√(var + eps) of the batch with training, else the variance.
  m.def(
      "batch_norm_act_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor scale, Tensor? residual, "
      "bool training, float eps, bool relu) -> Tensor");
  m.def(
      "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor scale, Tensor? output, "
      "bool training, float eps, bool need_x, bool need_residual) -> (Tensor, Tensor, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) {
  m.impl("batch_norm_act", &rf::norm::forward);
  m.impl("batch_norm_act_apply", &rf::norm::apply);
  m.impl("batch_norm_act_backward", &rf::norm::backward);
}
