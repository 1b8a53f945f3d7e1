// simt_runner list | planted NAME | conv|add_relu|batch_norm_act|bottleneck FOLDER
#include <cstdio>
#include <cstring>

#include "run.h"

int main(int argc, char** argv) {
  const char* command = argc > 1 ? argv[1] : "";
  if (std::strcmp(command, "list") == 0) {
    simt::list_conv_kernels();
    return 0;
  }
  if (argc != 3) {
    std::fprintf(stderr, "usage: simt_runner list | planted NAME | conv|add_relu|batch_norm_act|bottleneck FOLDER\n");
    return 2;
  }
  if (std::strcmp(command, "planted") == 0) {
    simt::run_planted(argv[2]);
    return 0;
  }
  simt::Request request(argv[2]);
  simt::set_seed(static_cast<uint64_t>(request.integer("seed")));
  if (std::strcmp(command, "conv") == 0) simt::run_conv(request);
  if (std::strcmp(command, "add_relu") == 0) simt::run_add_relu(request);
  if (std::strcmp(command, "batch_norm_act") == 0) simt::run_batch_norm_act(request);
  if (std::strcmp(command, "bottleneck") == 0) simt::run_bottleneck(request);
  return 0;
}
