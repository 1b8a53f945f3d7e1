#include "common/launch.cuh"
#include "conv_bn_act/cuda.h"
#include "conv_bn_act/launch.cuh"

namespace rf::conv {

void launch_fp16(const Plan& plan, void* stream) { run_part<fp16, Element::kFP16, Precision::kTensorCore>(plan, Launcher{stream}); }

}  // namespace rf::conv
