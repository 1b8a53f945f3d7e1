#include "common/launch.cuh"
#include "conv_bn_act/cuda.h"
#include "conv_bn_act/launch.cuh"

namespace rf::conv {

void launch_bf16(const Plan& plan, void* stream) { run_part<bf16, Element::kBF16, Precision::kTensorCore>(plan, Launcher{stream}); }

}  // namespace rf::conv
