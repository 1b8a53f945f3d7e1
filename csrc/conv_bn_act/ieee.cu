#include "common/launch.cuh"
#include "conv_bn_act/cuda.h"
#include "conv_bn_act/launch.cuh"

namespace rf::conv {

void launch_ieee(const Plan& plan, void* stream) { run_part<float, Element::kFP32, Precision::kIeee>(plan, Launcher{stream}); }

}  // namespace rf::conv
