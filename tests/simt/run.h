// The runner's commands, and how they launch.
#pragma once

#include "request.h"
#include "runtime.h"

namespace simt {

struct HostLauncher {
  template <class Kernel, class Args>
  void operator()(Kernel kernel, unsigned grid_x, unsigned grid_z, unsigned threads, unsigned shared_bytes,
                  const Args& args) const {
    launch({grid_x, 1, grid_z}, threads, shared_bytes, [&] { kernel(args); });
  }
};

void list_conv_kernels();
void run_conv(Request& request);
void run_add_relu(Request& request);
void run_batch_norm_act(Request& request);
void run_bottleneck(Request& request);
void run_planted(const char* name);

}  // namespace simt
