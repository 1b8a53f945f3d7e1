#include "add_relu/cuda.h"
#include "add_relu/launch.cuh"
#include "common/launch.cuh"

namespace rf::add_relu {

template <class T>
static void launch_element(const Plan& plan, Operation operation, Launcher launcher) {
  if (operation == Operation::kAddRelu) {
    run<T, AddRelu>(plan, launcher);
  } else {
    run<T, ReluBackward>(plan, launcher);
  }
}

void launch(const Plan& plan, Element element, Operation operation, void* stream) {
  switch (element) {
    case Element::kBF16:
      return launch_element<bf16>(plan, operation, Launcher{stream});
    case Element::kFP16:
      return launch_element<fp16>(plan, operation, Launcher{stream});
    case Element::kFP32:
      return launch_element<float>(plan, operation, Launcher{stream});
  }
}

}  // namespace rf::add_relu
