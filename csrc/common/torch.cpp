#include "common/torch.h"

// In libtorch_cuda, which a CPU build of torch has not.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
// From torch 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace rf {

std::string last_error() {
  return torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "";
}

Pair Arguments::pair() {
  const auto values = read<std::vector<int64_t>>();
  STD_TORCH_CHECK(values.size() == 2, "resnet_fused: got a list of ", values.size(), ", need a pair");
  return {values[0], values[1]};
}

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (const int64_t size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

namespace {

Tensor empty_strided_on(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype,
                        int32_t device_type, int32_t device_index) {
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, device_type,
                                 device_index, &handle),
        "empty_strided");
  return Tensor(handle);
}

std::vector<int64_t> list(torch::headeronly::IntHeaderOnlyArrayRef values) { return {values.begin(), values.end()}; }

}  // namespace

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype,
                     const Tensor& like) {
  int32_t device_type = 0, device_index = 0;
  check(aoti_torch_get_device_type(like.get(), &device_type), "get_device_type");
  check(aoti_torch_get_device_index(like.get(), &device_index), "get_device_index");
  return empty_strided_on(sizes, strides, dtype, device_type, device_index);
}

std::vector<int64_t> sum_strides(const std::vector<int64_t>& sizes, const std::vector<int64_t>& a,
                                 const std::vector<int64_t>& b, ScalarType dtype) {
  const auto meta = [&](const std::vector<int64_t>& strides) {
    return empty_strided_on(sizes, strides, dtype, aoti_torch_device_type_meta(), -1);
  };
  // maximum obeys the rule of every binary operation, and takes no scalar, which the stable ABI could not pass.
  return list(call("aten::maximum", "", meta(a), meta(b)).strides());
}

Tensor empty_like_sum(const Tensor& a, const Tensor& b) {
  const std::vector<int64_t> sizes = list(a.sizes());
  return empty_strided(sizes, sum_strides(sizes, list(a.strides()), list(b.strides()), a.scalar_type()),
                       a.scalar_type(), a);
}

Tensor empty_channels_last(const std::vector<int64_t>& sizes, const Tensor& like) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  return empty_strided(sizes, {h * w * c, 1, w * c, c}, like.scalar_type(), like);
}

void* current_stream(int device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "resnet_fused: this build of torch has no CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream), "get_current_cuda_stream");
  return stream;
}

}  // namespace rf
