// The CUDA device that a call runs on.
#pragma once

namespace rf {

int multiprocessors(int device);

// 80 for compute capability 8.0.
int capability(int device);

}  // namespace rf
