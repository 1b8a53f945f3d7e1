// Tensors as the CUDA kernels take them: raw pointers, and whatever has to be copied for that kept until the launch.
#pragma once

#include "common/torch.h"

namespace rf {

// The distance between neighbouring pixels of [N, C, H, W], or nothing when it is not the same throughout or channels
// are not adjacent. The stride of a dimension of size one means nothing.
inline std::optional<int64_t> pixel_stride(const Tensor& tensor) {
  if (tensor.size(1) > 1 && tensor.stride(1) != 1) return std::nullopt;
  std::optional<int64_t> pixel;
  int64_t count = 1;
  for (const int dim : {3, 2, 0}) {
    if (tensor.size(dim) > 1) {
      if (!pixel) pixel = tensor.stride(dim);
      if (tensor.stride(dim) != *pixel * count) return std::nullopt;
    }
    count *= tensor.size(dim);
  }
  return pixel.value_or(tensor.size(1));
}

inline bool channels_adjacent(const Tensor& tensor) { return tensor.size(1) == 1 || tensor.stride(1) == 1; }

inline bool dense_channels_last(const Tensor& tensor) { return pixel_stride(tensor) == tensor.size(1); }

class Operands {
 public:
  // A vector of channels; `wide` joins `bits` when it is float32.
  const void* vector(const Tensor& tensor, unsigned wide, unsigned& bits) {
    if (tensor.scalar_type() == ScalarType::Float) bits |= wide;
    const bool adjacent = tensor.size(0) <= 1 || tensor.stride(0) == 1;
    return keep(adjacent ? tensor : torch::stable::contiguous(tensor)).data_ptr();
  }
  const void* vector(const OptionalTensor& tensor, unsigned wide, unsigned& bits) {
    return tensor ? vector(*tensor, wide, bits) : nullptr;
  }
  Tensor keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor;
  }

 private:
  std::vector<Tensor> kept_;
};

}  // namespace rf
