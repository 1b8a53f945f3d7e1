// What add_relu.cu defines on a GPU.
#include <cstdio>

#include "add_relu/cuda.h"
#include "add_relu/launch.cuh"
#include "host.h"

namespace rf::add_relu {

template <class T>
static void launch_element(const Plan& plan, Operation operation) {
  if (operation == Operation::kAddRelu) return run<T, AddRelu>(plan, simt::HostLauncher{});
  run<T, ReluBackward>(plan, simt::HostLauncher{});
}

void launch(const Plan& plan, Element element, Operation operation, void*) {
  std::printf("%s grid %u\n", plan.strided ? "strided" : plan.vectors ? "vectors" : "elements", plan.grid);
  switch (element) {
    case Element::kBF16:
      return launch_element<bf16>(plan, operation);
    case Element::kFP16:
      return launch_element<fp16>(plan, operation);
    case Element::kFP32:
      return launch_element<float>(plan, operation);
  }
}

}  // namespace rf::add_relu
