// What nvcc compiles of conv_bn_act, as the host compiler calls it.
#pragma once

#include "conv_bn_act/plan.h"

namespace rf::conv {

#define RF_CONV_DECLARE(name, ...) void launch_##name(const Plan& plan, void* stream);
RF_CONV_PARTS(RF_CONV_DECLARE)
#undef RF_CONV_DECLARE

}  // namespace rf::conv
