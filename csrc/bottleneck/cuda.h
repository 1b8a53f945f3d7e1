// What nvcc compiles of bottleneck, as the host compiler calls it.
#pragma once

#include "bottleneck/plan.h"

namespace rf::bottleneck {

void launch_bf16(const Plan& plan, void* stream);
void launch_fp16(const Plan& plan, void* stream);

}  // namespace rf::bottleneck
