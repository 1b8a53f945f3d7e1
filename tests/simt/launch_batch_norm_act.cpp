// What the .cu files of batch_norm_act define on a GPU.
#include <cstdio>

#include "batch_norm_act/cuda.h"
#include "batch_norm_act/launch.cuh"
#include "host.h"

namespace rf::norm {

template <class T>
static void launch_element(const Plan& plan, Operation operation) {
  const Walk& walk = plan.args.walk;
  std::printf("%s %s lanes %d chunks %d splits %d\n", plan.channels_last ? "channels_last" : "nchw",
              plan.vectors ? "vectors" : "elements", 1 << walk.lanes_log2, walk.chunks, walk.splits);
  run<T>(plan, operation, simt::HostLauncher{});
  simt::banks().print();
}

void launch_bf16(const Plan& plan, Operation operation, void*) { launch_element<bf16>(plan, operation); }
void launch_fp16(const Plan& plan, Operation operation, void*) { launch_element<fp16>(plan, operation); }
void launch_fp32(const Plan& plan, Operation operation, void*) { launch_element<float>(plan, operation); }

}  // namespace rf::norm
