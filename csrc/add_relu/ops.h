// add_relu by CUDA, for other sources of the library.
#pragma once

#include "common/torch.h"

namespace rf::add_relu {

bool supports(const Tensor& a, const Tensor& b);
Tensor run_cuda(const Tensor& a, const Tensor& b);

}  // namespace rf::add_relu
