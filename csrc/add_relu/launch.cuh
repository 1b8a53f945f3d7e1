// From a plan to its kernel, by whatever means the caller launches.
#pragma once

#include "add_relu/kernel.cuh"
#include "add_relu/plan.h"

namespace rf::add_relu {

// The kernels that are built: X(element, op).
#define RF_ADD_RELU_KERNELS(X) \
  X(bf16, AddRelu)             \
  X(bf16, ReluBackward)        \
  X(fp16, AddRelu)             \
  X(fp16, ReluBackward)        \
  X(float, AddRelu)            \
  X(float, ReluBackward)

// Calls launcher(kernel, grid_x, grid_z, threads, shared_bytes, args) unless there is nothing to do.
template <class T, class Op, class Launcher>
void run(const Plan& plan, Launcher&& launcher) {
  if (plan.grid == 0) return;
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  if (plan.strided) {
    launcher(&strided_kernel<T, Op>, plan.grid, 1u, kThreads + 0u, 0u, plan.dims);
  } else if (plan.vectors) {
    launcher(&flat_kernel<T, Op, V>, plan.grid, 1u, kThreads + 0u, 0u, plan.flat);
  } else {
    launcher(&flat_kernel<T, Op, 1>, plan.grid, 1u, kThreads + 0u, 0u, plan.flat);
  }
}

}  // namespace rf::add_relu
