// How a run() of launch.cuh files launches on a GPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

namespace rf {

struct Launcher {
  void* stream;

  template <class Kernel, class Args>
  void operator()(Kernel kernel, unsigned grid_x, unsigned grid_z, unsigned threads, unsigned shared_bytes,
                  const Args& args) const {
    if (shared_bytes > (48u << 10)) {  // the limit without asking
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    }
    kernel<<<dim3(grid_x, 1, grid_z), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
    check(cudaGetLastError());
  }

  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "resnet_fused: CUDA error: ", cudaGetErrorString(error));
  }
};

}  // namespace rf
