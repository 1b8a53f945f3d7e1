// From a plan to its kernels, by whatever means the caller launches.
#pragma once

#include "conv_bn_act/kernel.cuh"
#include "conv_bn_act/plan.h"

namespace rf::conv {

#define RF_CONV_TILE(name, element, math, bm, bn, row_bytes, grid_m, grid_n, stages, copy, blocks)  \
  using tile_##name = Tile<element, math, bm, bn, row_bytes, grid_m, grid_n, stages, copy, blocks>; \
  static_assert(tile_##name::SHARED_BYTES == info(Kernel::k_##name).shared_bytes &&                 \
                tile_##name::THREADS == info(Kernel::k_##name).threads);
RF_CONV_KERNELS(RF_CONV_TILE)
#undef RF_CONV_TILE

// Calls launcher(kernel, grid_x, grid_z, threads, shared_bytes, args) once, or twice when the plan splits. On a GPU the
// launcher is common/launch.cuh's. Only the kernels of this element and precision are compiled: the parts of run().
template <class T, Element E, Precision P, class Launcher>
void run_part(const Plan& plan, Launcher&& launcher) {
  switch (plan.kernel) {
#define RF_CONV_LAUNCH(name, ...)                                                                                \
  case Kernel::k_##name:                                                                                         \
    if constexpr (info(Kernel::k_##name).element == E && info(Kernel::k_##name).precision == P) {                \
      launcher(&conv_kernel<tile_##name>, plan.grid_x, plan.grid_z, plan.threads, plan.shared_bytes, plan.args); \
    }                                                                                                            \
    break;
    RF_CONV_KERNELS(RF_CONV_LAUNCH)
#undef RF_CONV_LAUNCH
    case Kernel::kCount:
      return;
  }
  if (plan.args.splits > 1) launcher(&reduce_kernel<T>, plan.reduce_grid, 1u, kReduceThreads + 0u, 0u, plan.args);
}

template <class Launcher>
void run(const Plan& plan, Launcher&& launcher) {
  if (plan.kernel == Kernel::kCount) return;
#define RF_CONV_RUN(name, T, E, P) \
  if (info(plan.kernel).element == E && info(plan.kernel).precision == P) run_part<T, E, P>(plan, launcher);
  RF_CONV_PARTS(RF_CONV_RUN)
#undef RF_CONV_RUN
}

}  // namespace rf::conv
