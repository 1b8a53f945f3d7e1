#include "bottleneck/cuda.h"
#include "bottleneck/launch.cuh"
#include "common/launch.cuh"

namespace rf::bottleneck {

void launch_fp16(const Plan& plan, void* stream) { run_part<fp16, Element::kFP16>(plan, Launcher{stream}); }

}  // namespace rf::bottleneck
