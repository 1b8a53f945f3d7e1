#include "batch_norm_act/cuda.h"
#include "batch_norm_act/launch.cuh"
#include "common/launch.cuh"

namespace rf::norm {

void launch_fp32(const Plan& plan, Operation operation, void* stream) { run<float>(plan, operation, Launcher{stream}); }

}  // namespace rf::norm
