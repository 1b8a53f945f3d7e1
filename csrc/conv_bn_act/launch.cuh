// From a plan to its kernels, by whatever means the caller launches.
#pragma once

#include "conv_bn_act/kernel.cuh"
#include "conv_bn_act/plan.h"

namespace rf::conv {

#define RF_CONV_TILE(name, element, math, bm, bn, row_bytes, grid_m, grid_n, stages, copy)  \
  using tile_##name = Tile<element, math, bm, bn, row_bytes, grid_m, grid_n, stages, copy>; \
  static_assert(tile_##name::SHARED_BYTES == info(Kernel::k_##name).shared_bytes &&         \
                tile_##name::THREADS == info(Kernel::k_##name).threads);
RF_CONV_KERNELS(RF_CONV_TILE)
#undef RF_CONV_TILE

// Calls launcher(kernel, grid_x, grid_z, threads, shared_bytes, args) once, or twice when the plan splits. On a GPU the
// launcher raises the kernel's shared memory limit above 48 KiB with cudaFuncSetAttribute and launches on its stream.
template <class Launcher>
void run(const Plan& plan, Launcher&& launcher) {
  switch (plan.kernel) {
#define RF_CONV_LAUNCH(name, ...)                                                                              \
  case Kernel::k_##name:                                                                                       \
    launcher(&conv_kernel<tile_##name>, plan.grid_x, plan.grid_z, plan.threads, plan.shared_bytes, plan.args); \
    break;
    RF_CONV_KERNELS(RF_CONV_LAUNCH)
#undef RF_CONV_LAUNCH
    case Kernel::kCount:
      return;
  }
  if (plan.args.splits == 1) return;
  switch (info(plan.kernel).element) {
    case Element::kBF16:
      return launcher(&reduce_kernel<bf16>, plan.reduce_grid, 1u, kReduceThreads + 0u, 0u, plan.args);
    case Element::kFP16:
      return launcher(&reduce_kernel<fp16>, plan.reduce_grid, 1u, kReduceThreads + 0u, 0u, plan.args);
    case Element::kFP32:
      return launcher(&reduce_kernel<float>, plan.reduce_grid, 1u, kReduceThreads + 0u, 0u, plan.args);
  }
}

}  // namespace rf::conv
