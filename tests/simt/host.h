// What stands in for a GPU where the bindings of csrc run on the host: how they launch, and the device that they ask.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace simt {

struct HostLauncher {
  template <class Kernel, class Args>
  void operator()(Kernel kernel, unsigned grid_x, unsigned grid_z, unsigned threads, unsigned shared_bytes,
                  const Args& args) const {
    launch({grid_x, 1, grid_z}, threads, shared_bytes, [&] { kernel(args); });
  }
};

struct Device {
  int multiprocessors = 2;
  int shared_block = 227 << 10, shared_multiprocessor = 228 << 10;  // bytes; an sm_90's
  // Of the images that a call allocates, in order, bit i says that the i-th misses 16-byte alignment by one element.
  int64_t shifted = 0;
};

Device& device();

void run_planted(const char* name);

}  // namespace simt
