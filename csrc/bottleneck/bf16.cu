#include "bottleneck/cuda.h"
#include "bottleneck/launch.cuh"
#include "common/launch.cuh"

namespace rf::bottleneck {

void launch_bf16(const Plan& plan, void* stream) { run_part<bf16, Element::kBF16>(plan, Launcher{stream}); }

}  // namespace rf::bottleneck
