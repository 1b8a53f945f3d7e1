#include "common/launch.cuh"
#include "conv_bn_act/cuda.h"
#include "conv_bn_act/launch.cuh"

namespace rf::conv {

void launch_tf32(const Plan& plan, void* stream) { run_part<float, Element::kFP32, Precision::kTensorCore>(plan, Launcher{stream}); }

}  // namespace rf::conv
