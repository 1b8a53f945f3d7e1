// resnet_fused_cuda::add_relu, add_relu_ and relu_backward: check, plan and launch.
#include "add_relu/cuda.h"

#include "add_relu/ops.h"
#include "common/device.h"

namespace rf::add_relu {

namespace {

Element element_of(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
                  "a: need bfloat16, float16 or float32");
  if (dtype == ScalarType::Float) return Element::kFP32;
  return dtype == ScalarType::Half ? Element::kFP16 : Element::kBF16;
}

void check_pair(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  STD_TORCH_CHECK(std::vector<int64_t>(left.begin(), left.end()) == std::vector<int64_t>(right.begin(), right.end()),
                  "b: got shape ", shape_text(b), ", need that of a, ", shape_text(a));
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "b: need the dtype of a");
  STD_TORCH_CHECK(a.device() == b.device(), "b: need the device of a");
}

// out may be a.
void compute(const Tensor& a, const Tensor& b, const Tensor& out, Operation operation) {
  const int device = a.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Element element = element_of(a.scalar_type());
  const Plan plan = make_plan(
      {a.data_ptr(), b.data_ptr(), out.data_ptr(), element == Element::kFP32 ? 4 : 2, static_cast<int>(a.dim()),
       a.sizes().data(), a.strides().data(), b.strides().data(), out.strides().data()},
      multiprocessors(device));
  STD_TORCH_CHECK(!plan.refusal, "add_relu by cuda: ", plan.refusal);
  launch(plan, element, operation, current_stream(device));
}

}  // namespace

bool supports(const Tensor& a, const Tensor& b) {
  const ScalarType dtype = a.scalar_type();
  const bool known = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float;
  return known && (a.dim() <= kMaxDims || (a.is_contiguous() && b.is_contiguous()));
}

Tensor run_cuda(const Tensor& a, const Tensor& b) {
  check_pair(a, b);
  const Tensor out = empty_like_sum(a, b);
  if (out.numel() > 0) compute(a, b, out, Operation::kAddRelu);
  return out;
}

namespace {

void add_relu(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor a = arguments.tensor(), b = arguments.tensor();
  give(stack, run_cuda(a, b));
}

void add_relu_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor a = arguments.tensor(), b = arguments.tensor();
  check_pair(a, b);
  if (a.numel() > 0) compute(a, b, a, Operation::kAddRelu);
  give(stack, a);
}

void relu_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor gradient = arguments.tensor(), output = arguments.tensor();
  check_pair(gradient, output);
  const Tensor out = empty_like_sum(gradient, output);
  if (out.numel() > 0) compute(gradient, output, out, Operation::kReluBackward);
  give(stack, out);
}

}  // namespace

}  // namespace rf::add_relu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def("add_relu(Tensor a, Tensor b) -> Tensor");
  m.def("add_relu_(Tensor(a!) a, Tensor b) -> Tensor(a!)");
  m.def("relu_backward(Tensor gradient, Tensor output) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) {
  m.impl("add_relu", &rf::add_relu::add_relu);
  m.impl("add_relu_", &rf::add_relu::add_relu_);
  m.impl("relu_backward", &rf::add_relu::relu_backward);
}
