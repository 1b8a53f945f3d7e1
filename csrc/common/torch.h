// What the bindings use of torch: the stable ABI alone, so that one build serves every torch from the target on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rf {

using torch::headeronly::DeviceType;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Pair = std::array<int64_t, 2>;

// What the last failed call said, where this torch keeps it.
std::string last_error();

inline void check(AOTITorchError error, const char* what) {
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "resnet_fused: ", what, " failed. ", last_error());
}

// Calls an operator that returns one tensor through the dispatcher.
template <class... Args>
Tensor call(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  check(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION), op);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The arguments of a boxed kernel, read in the order of its schema; each must be read once, since reading owns it.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  template <class T>
  T read() {
    return torch::stable::detail::to<T>(*next_++);
  }
  Tensor tensor() { return read<Tensor>(); }
  OptionalTensor optional_tensor() { return read<OptionalTensor>(); }
  std::string text() { return read<std::string>(); }
  Pair pair();

 private:
  StableIValue* next_;
};

inline void give(StableIValue* stack, const Tensor& result) { stack[0] = torch::stable::detail::from(result); }

// "Tensor x of [2, 3]" and the like, for messages.
std::string shape_text(const Tensor& tensor);

// On the device of `like`.
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype,
                     const Tensor& like);

// A new [N, C, H, W] of channels_last strides.
Tensor empty_channels_last(const std::vector<int64_t>& sizes, const Tensor& like);

// The strides that aten gives a sum of two tensors with these; the meta device computes them.
std::vector<int64_t> sum_strides(const std::vector<int64_t>& sizes, const std::vector<int64_t>& a,
                                 const std::vector<int64_t>& b, ScalarType dtype);

// A new tensor with the strides that aten gives a + b.
Tensor empty_like_sum(const Tensor& a, const Tensor& b);

inline Tensor channels_last(const Tensor& tensor) {
  return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
}

// The current stream of torch on this device.
void* current_stream(int device);

}  // namespace rf
