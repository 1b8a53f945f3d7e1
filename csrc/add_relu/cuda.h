// What nvcc compiles of add_relu, as the host compiler calls it.
#pragma once

#include "add_relu/plan.h"

namespace rf::add_relu {

enum class Element { kBF16, kFP16, kFP32 };
enum class Operation { kAddRelu, kReluBackward };

void launch(const Plan& plan, Element element, Operation operation, void* stream);

}  // namespace rf::add_relu
