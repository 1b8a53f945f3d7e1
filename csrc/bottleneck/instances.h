// The kernels that are built, once: the plan, the launch, the host runtime and the static budget all read this list.
#pragma once

// X(name, MID, CIN, STRIDE, PROJECT, TILE_H, TILE_W, HALO_TILES, W_SLOTS, X_SLOTS, BLOCKS): see tile.h. W_SLOTS 0: the
// weights stay in shared memory. plan.h chooses among the kernels for one problem, of equals the first.
#define RF_BOTTLENECK_SHAPES(X, element)                                               \
  X(element##_mid64_c256_resident, element, 64, 256, 1, false, 8, 16, 3, 0, 2, 1)      \
  X(element##_mid64_c256, element, 64, 256, 1, false, 8, 16, 3, 3, 2, 1)               \
  X(element##_mid64_c256_small, element, 64, 256, 1, false, 8, 8, 2, 4, 4, 2)          \
  X(element##_mid64_c64_project_resident, element, 64, 64, 1, true, 8, 16, 3, 0, 1, 1) \
  X(element##_mid64_c64_project, element, 64, 64, 1, true, 8, 16, 3, 3, 1, 1)          \
  X(element##_mid64_c64_project_small, element, 64, 64, 1, true, 8, 8, 2, 5, 1, 2)     \
  X(element##_mid64_c256_project, element, 64, 256, 1, true, 8, 16, 3, 3, 2, 1)        \
  X(element##_mid128_c512, element, 128, 512, 1, false, 28, 4, 3, 3, 2, 1)             \
  X(element##_mid128_c512_small, element, 128, 512, 1, false, 8, 8, 2, 4, 4, 1)        \
  X(element##_mid128_c512_tight, element, 128, 512, 1, false, 8, 8, 2, 2, 2, 1)        \
  X(element##_mid128_c256_project, element, 128, 256, 1, true, 8, 16, 3, 3, 2, 1)      \
  X(element##_mid128_c256_project_small, element, 128, 256, 1, true, 8, 8, 2, 2, 2, 1) \
  X(element##_mid128_c256_stride2, element, 128, 256, 2, true, 7, 14, 2, 2, 2, 1)      \
  X(element##_mid128_c256_stride2_small, element, 128, 256, 2, true, 7, 7, 2, 2, 2, 1)

#define RF_BOTTLENECK_KERNELS(X) \
  RF_BOTTLENECK_SHAPES(X, bf16)  \
  RF_BOTTLENECK_SHAPES(X, fp16)
