#include "common/device.h"

#include <atomic>

#include "common/launch.cuh"

namespace rf {

namespace {

// Asked once for each device: a query takes longer than a launch.
template <cudaDeviceAttr ATTRIBUTE>
int attribute(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // one more than the value; 0: not asked yet
  int value = device < kDevices ? known[device].load(std::memory_order_relaxed) - 1 : -1;
  if (value < 0) {
    Launcher::check(cudaDeviceGetAttribute(&value, ATTRIBUTE, device));
    if (device < kDevices) known[device].store(value + 1, std::memory_order_relaxed);
  }
  return value;
}

}  // namespace

int multiprocessors(int device) { return attribute<cudaDevAttrMultiProcessorCount>(device); }

int capability(int device) {
  return attribute<cudaDevAttrComputeCapabilityMajor>(device) * 10 +
         attribute<cudaDevAttrComputeCapabilityMinor>(device);
}

int shared_per_block(int device) { return attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device); }

int shared_per_multiprocessor(int device) { return attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(device); }

}  // namespace rf
