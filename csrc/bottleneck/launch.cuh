// From a plan to its kernel, by whatever means the caller launches.
#pragma once

#include "bottleneck/kernel.cuh"
#include "bottleneck/plan.h"

namespace rf::bottleneck {

// Calls launcher(kernel, grid_x, grid_z, threads, shared_bytes, args) once; only the kernels of this element are
// compiled. On a GPU the launcher is common/launch.cuh's.
template <class T, Element E, class Launcher>
void run_part(const Plan& plan, Launcher&& launcher) {
  switch (plan.kernel) {
#define RF_BOTTLENECK_LAUNCH(name, type, ...)                                                          \
  case Kernel::k_##name:                                                                                    \
    if constexpr (info(Kernel::k_##name).element == E) {                                                    \
      launcher(&bottleneck_kernel<T, Tile<__VA_ARGS__>>, plan.grid, 1u, kThreads + 0u,                      \
               static_cast<unsigned>(info(Kernel::k_##name).shared_bytes), plan.args);                      \
    }                                                                                                       \
    break;
    RF_BOTTLENECK_KERNELS(RF_BOTTLENECK_LAUNCH)
#undef RF_BOTTLENECK_LAUNCH
    case Kernel::kCount:
      break;
  }
}

}  // namespace rf::bottleneck
