#include "batch_norm_act/cuda.h"
#include "batch_norm_act/launch.cuh"
#include "common/launch.cuh"

namespace rf::norm {

void launch_fp16(const Plan& plan, Operation operation, void* stream) { run<fp16>(plan, operation, Launcher{stream}); }

}  // namespace rf::norm
