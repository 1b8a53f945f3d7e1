// The CUDA device that a call runs on.
#pragma once

namespace rf {

int multiprocessors(int device);

}  // namespace rf
