// What nvcc compiles of batch_norm_act, as the host compiler calls it.
#pragma once

#include "batch_norm_act/plan.h"

namespace rf::norm {

void launch_bf16(const Plan& plan, Operation operation, void* stream);
void launch_fp16(const Plan& plan, Operation operation, void* stream);
void launch_fp32(const Plan& plan, Operation operation, void* stream);

}  // namespace rf::norm
