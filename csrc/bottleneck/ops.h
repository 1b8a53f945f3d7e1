// bottleneck by CUDA in one kernel, for other sources of the library.
#pragma once

#include "block/block.h"

namespace rf::bottleneck {

// Why no kernel here computes this block on x's device, or null.
const char* refusal_of(const rf::Block& block);

// kernel is the plan's own choice where it is "".
Tensor run_cuda(const rf::Block& block, const std::string& kernel);

}  // namespace rf::bottleneck
