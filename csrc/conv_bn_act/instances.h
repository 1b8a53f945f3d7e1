// The kernels that are built, once: the plan, the launch, the host runtime and the static budget all read this list.
#pragma once

// X(name, element, math, BM, BN, ROW_BYTES, GRID_M, GRID_N, STAGES, COPY, BLOCKS): see kernel.cuh. ROW_BYTES is the depth
// of one step of the reduction; GRID is in warps for TensorCore and in threads for Ieee; COPY is in elements and must
// divide the channels of a group. BLOCKS is what the registers of a multiprocessor hold, as the compiler is told. A stage
// takes (BM + BN) · ROW_BYTES: the largest tile stays under the 99 KiB of sm_86 and sm_120; test_static_budget.py has how
// many blocks an architecture's shared memory holds as well.
#define RF_CONV_HALF(X, element)                                          \
  X(element##_128x128, element, TensorCore, 128, 128, 64, 2, 4, 4, 8, 2)  \
  X(element##_128x64, element, TensorCore, 128, 64, 64, 2, 2, 4, 8, 3)    \
  X(element##_64x128, element, TensorCore, 64, 128, 64, 2, 2, 4, 8, 3)    \
  X(element##_64x64, element, TensorCore, 64, 64, 128, 2, 2, 3, 8, 4)     \
  X(element##_64x32, element, TensorCore, 64, 32, 128, 4, 1, 3, 8, 5)     \
  X(element##_64x32_c4, element, TensorCore, 64, 32, 64, 4, 1, 4, 4, 6)   \
  X(element##_128x64_c1, element, TensorCore, 128, 64, 64, 2, 2, 3, 1, 3) \
  X(element##_64x32_c1, element, TensorCore, 64, 32, 64, 4, 1, 3, 1, 6)

#define RF_CONV_FP32(X)                                            \
  X(tf32_128x128, float, TensorCore, 128, 128, 64, 2, 4, 4, 4, 2)  \
  X(tf32_128x64, float, TensorCore, 128, 64, 64, 2, 2, 4, 4, 3)    \
  X(tf32_64x64, float, TensorCore, 64, 64, 128, 2, 2, 3, 4, 4)     \
  X(tf32_64x32, float, TensorCore, 64, 32, 64, 4, 1, 4, 4, 6)      \
  X(tf32_128x64_c1, float, TensorCore, 128, 64, 64, 2, 2, 3, 1, 3) \
  X(tf32_64x32_c1, float, TensorCore, 64, 32, 64, 4, 1, 3, 1, 6)   \
  X(ieee_128x128, float, Ieee, 128, 128, 64, 16, 16, 3, 4, 1)      \
  X(ieee_64x64, float, Ieee, 64, 64, 64, 8, 16, 4, 4, 3)           \
  X(ieee_64x32, float, Ieee, 64, 32, 64, 16, 8, 4, 4, 4)           \
  X(ieee_128x64_c1, float, Ieee, 128, 64, 64, 16, 8, 3, 1, 2)      \
  X(ieee_64x32_c1, float, Ieee, 64, 32, 64, 16, 8, 3, 1, 4)

#define RF_CONV_KERNELS(X) \
  RF_CONV_HALF(X, bf16)    \
  RF_CONV_HALF(X, fp16)    \
  RF_CONV_FP32(X)

// The parts that are compiled apart, in parallel: X(name, element type, element, precision).
#define RF_CONV_PARTS(X)                                  \
  X(bf16, bf16, Element::kBF16, Precision::kTensorCore)   \
  X(fp16, fp16, Element::kFP16, Precision::kTensorCore)   \
  X(tf32, float, Element::kFP32, Precision::kTensorCore)  \
  X(ieee, float, Element::kFP32, Precision::kIeee)
