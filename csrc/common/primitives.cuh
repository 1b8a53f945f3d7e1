// What kernels may ask of the machine. Kernels hold no inline PTX and touch shared memory only by SharedAddress, so
// that the same source runs on a GPU (ptx.cuh) and, fiber by fiber, on a CPU under checks
// (tests/simt/host_primitives.h).
//
// Both sides give, in namespace rf:
//   thread_x  block_x  block_z  grid_x                       int, the coordinates of this thread and block
//   dynamic_shared                                           SharedAddress of the block's dynamic shared memory
//   RF_SHARED_ARRAY(T, name, COUNT)                          declares static shared memory, name is a SharedAddress
//   barrier  warp_barrier  shuffle_xor  shuffle  ballot      whole block, whole warp (all 32 lanes take part)
//   load_global<V>  store_global                             one access of sizeof(V) bytes, aligned to it
//   load_shared<V>  store_shared                             the same in shared memory
//   async_copy<BYTES>(to, from, valid)                       global to shared in the background; zeros when not valid
//   async_commit  async_wait<N>                              close a group; wait until at most N groups are under way
//   load_matrix<1|2|4, transposed>(out, row)                 ldmatrix: 8x8 tiles of 16-bit, one row address per lane
//   mma<T>(d, a, b)                                          d += a·b: m16n8k16 for bf16 and fp16, m16n8k8 for TF32
#pragma once

#include "common/number.cuh"

#ifdef __CUDACC__
#include "common/ptx.cuh"
#else
#include "host_primitives.h"
#endif
