// What the .cu files of conv_bn_act define on a GPU.
#include <cstdio>

#include "conv_bn_act/cuda.h"
#include "conv_bn_act/launch.cuh"
#include "host.h"

namespace rf::conv {

template <class T, Element E, Precision P>
static void launch_part(const Plan& plan) {
  std::printf("kernel %s grid %u %u splits %d vector_out %d\n", info(plan.kernel).name, plan.grid_x, plan.grid_z,
              plan.args.splits, plan.args.vector_out);
  run_part<T, E, P>(plan, simt::HostLauncher{});
  simt::banks().print();
}

#define RF_CONV_DEFINE(name, T, E, P) \
  void launch_##name(const Plan& plan, void*) { launch_part<T, E, P>(plan); }
RF_CONV_PARTS(RF_CONV_DEFINE)
#undef RF_CONV_DEFINE

}  // namespace rf::conv
