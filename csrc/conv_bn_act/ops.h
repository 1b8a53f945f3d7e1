// conv_bn_act by CUDA, for other sources of the library.
#pragma once

#include "common/conv_bn.h"

namespace rf::conv {

// Why no kernel here computes this call on x's device, or null.
const char* refusal_of(const Tensor& x, const ConvBN& conv);

// kernel and splits are the plan's own choice where they are "" and 0. tf32 counts for float32 alone.
Tensor run_cuda(const Tensor& x, const ConvBN& conv, const OptionalTensor& residual, bool relu, bool tf32,
                const std::string& kernel, int64_t splits);

}  // namespace rf::conv
