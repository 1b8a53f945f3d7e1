// The CUDA device that a call runs on.
#pragma once

namespace rf {

int multiprocessors(int device);

// 80 for compute capability 8.0.
int capability(int device);

// Bytes of shared memory that a block may ask for, and that a multiprocessor has.
int shared_per_block(int device);
int shared_per_multiprocessor(int device);

}  // namespace rf
