// From a plan to its kernels, by whatever means the caller launches.
#pragma once

#include "batch_norm_act/kernel.cuh"
#include "batch_norm_act/plan.h"

namespace rf::norm {

template <class T, int V, bool LAST, class Launcher>
void run_layout(const Plan& plan, Operation operation, const Launcher& launcher) {
  const auto launch = [&](auto kernel, unsigned grid) { launcher(kernel, grid, 1u, kThreads + 0u, 0u, plan.args); };
  if (operation == Operation::kBackward) {
    launch(&sums_kernel<T, V, LAST>, plan.grid);
    launch(&merge_sums_kernel<T>, plan.merge_grid);
    if (plan.args.dx || plan.args.dresidual) launch(&gradient_kernel<T, V, LAST>, plan.grid);
    return;
  }
  if (operation == Operation::kForward) {
    launch(&statistics_kernel<T, V, LAST>, plan.grid);
    launch(&merge_statistics_kernel<T>, plan.merge_grid);
  }
  launch(&apply_kernel<T, V, LAST>, plan.grid);
}

// Calls launcher(kernel, grid_x, grid_z, threads, shared_bytes, args) for each kernel of the operation, in order.
template <class T, class Launcher>
void run(const Plan& plan, Operation operation, const Launcher& launcher) {
  if (plan.grid == 0) return;
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  if (plan.channels_last) {
    plan.vectors ? run_layout<T, V, true>(plan, operation, launcher) : run_layout<T, 1, true>(plan, operation, launcher);
  } else {
    plan.vectors ? run_layout<T, V, false>(plan, operation, launcher)
                 : run_layout<T, 1, false>(plan, operation, launcher);
  }
}

}  // namespace rf::norm
