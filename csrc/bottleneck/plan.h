// Which kernel runs a bottleneck, and how: plain host C++, no CUDA header.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "bottleneck/args.h"
#include "bottleneck/instances.h"
#include "bottleneck/tile.h"

namespace rf::bottleneck {

#define RF_BOTTLENECK_ID(name, ...) k_##name,
enum class Kernel : int { RF_BOTTLENECK_KERNELS(RF_BOTTLENECK_ID) kCount };
#undef RF_BOTTLENECK_ID

constexpr int kKernelCount = static_cast<int>(Kernel::kCount);

// A kernel's constants of tile.h as data.
struct KernelInfo {
  const char* name;
  Element element;
  int mid, cin, stride;
  bool project, resident;
  int tile_h, tile_w, halo_h, halo_w, rows, pass_rows, passes;
  int steps, chunk_bytes;
  int shared_bytes, blocks;
  int64_t products, weight_bytes, fragments, landed, moved;
  std::array<int, 8> regions;      // of shared memory: where each begins, in tile.h's order
  std::array<int, 10> parameters;  // of the template
};

// Bytes of shared memory: what a block may have, what a multiprocessor has.
struct Limits {
  int multiprocessors;
  int block, multiprocessor;
};

// What the problem is, apart from its sizes.
struct Shape {
  Element element;
  int cin, mid, cout, stride;
  bool project;
};

struct Sizes {
  int64_t n, h, w;  // of x
};

struct Plan {
  const char* refusal = nullptr;  // why nothing can run, else null
  Kernel kernel = Kernel::kCount;
  Args args{};  // with the plan's fields set
  unsigned grid = 0;
};

namespace detail {
struct bf16 {
  static constexpr Element kElement = Element::kBF16;
};
struct fp16 {
  static constexpr Element kElement = Element::kFP16;
};

template <class E, class Tile>
constexpr KernelInfo describe(const char* name, const std::array<int, 10>& parameters) {
  return {name,
          E::kElement,
          Tile::MID,
          Tile::CIN,
          Tile::STRIDE,
          Tile::PROJECT,
          Tile::RESIDENT,
          Tile::TILE_H,
          Tile::TILE_W,
          Tile::kHaloH,
          Tile::kHaloW,
          Tile::kRows,
          Tile::kPassRows,
          Tile::kPasses,
          Tile::kSteps,
          Tile::kChunkBytes,
          Tile::kSharedBytes,
          Tile::BLOCKS,
          Tile::kProducts,
          Tile::kWeightBytes,
          Tile::kFragments,
          Tile::kLanded,
          Tile::kMoved,
          {Tile::kTable, Tile::kTable2, Tile::kTable3, Tile::kTableShortcut, Tile::kWeights, Tile::kX, Tile::kHidden,
           Tile::kCentre},
          parameters};
}

#define RF_BOTTLENECK_INFO(name, type, ...) describe<type, Tile<__VA_ARGS__>>(#name, {__VA_ARGS__}),
inline constexpr KernelInfo kKernels[] = {RF_BOTTLENECK_KERNELS(RF_BOTTLENECK_INFO)};
#undef RF_BOTTLENECK_INFO
}  // namespace detail

constexpr const KernelInfo& info(Kernel kernel) { return detail::kKernels[static_cast<int>(kernel)]; }

// kCount without a name, and where there is none of this name.
inline Kernel kernel_named(const char* name) {
  for (int i = 0; i < kKernelCount; ++i) {
    if (std::strcmp(detail::kKernels[i].name, name) == 0) return static_cast<Kernel>(i);
  }
  return Kernel::kCount;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of an image of h x w pixels of x.
inline std::array<int64_t, 2> tiles_of(const KernelInfo& k, int64_t h, int64_t w) {
  return {ceil_div((h - 1) / k.stride + 1, k.tile_h), ceil_div((w - 1) / k.stride + 1, k.tile_w)};
}

// Clocks of the slowest of tensor cores, shared memory and L2, as resnet_fused.roofline.whole_block counts them: an H200's
// rates, for each multiprocessor. They rank kernels and promise nothing.
inline double clocks_of(const KernelInfo& k, const Sizes& sizes, int multiprocessors) {
  constexpr double kProductsPerClock = 1091, kSharedBytesPerClock = 128, kL2BytesPerClock = 24.5;
  const auto real = [](int64_t value) { return static_cast<double>(value); };
  const auto [down, across] = tiles_of(k, sizes.h, sizes.w);
  const double tiles = real(down * across) * real(sizes.n), most = std::ceil(tiles / multiprocessors);
  const double weights = real(k.weight_bytes) * (k.resident ? std::min<double>(tiles, multiprocessors) : tiles);
  const double weights_of_most = real(k.weight_bytes) * (k.resident ? 1 : most);
  return std::max({most * real(k.products) / kProductsPerClock,
                   (most * real(k.fragments + k.landed) + weights_of_most) / kSharedBytesPerClock,
                   (tiles * real(k.moved) + weights) / (kL2BytesPerClock * multiprocessors)});
}

// Of the kernels for this shape that a block's shared memory can hold the quickest for these sizes; `choice` instead,
// where it is one.
inline Kernel kernel_for(const Shape& shape, const Sizes& sizes, const Limits& limits, const char** refusal,
                         Kernel choice = Kernel::kCount) {
  bool known = false;
  Kernel best = Kernel::kCount;
  for (int i = 0; i < kKernelCount; ++i) {
    const KernelInfo& k = detail::kKernels[i];
    if (k.element != shape.element || k.mid != shape.mid || k.cin != shape.cin || k.stride != shape.stride ||
        k.project != shape.project || shape.cout != 4 * shape.mid) {
      continue;
    }
    known = true;
    if (k.shared_bytes > limits.block || (choice != Kernel::kCount && choice != static_cast<Kernel>(i))) continue;
    if (best == Kernel::kCount || clocks_of(k, sizes, limits.multiprocessors) <
                                      clocks_of(info(best), sizes, limits.multiprocessors)) {
      best = static_cast<Kernel>(i);
    }
  }
  if (best != Kernel::kCount) return best;
  *refusal = !known ? "no whole-block kernel has these channels, stride and shortcut"
             : choice == Kernel::kCount ? "this device's shared memory does not hold the block"
                                        : "the kernel asked for does not fit the problem or the device";
  return Kernel::kCount;
}

// One of the block's convolutions, by its sizes.
struct ConvShape {
  std::array<int64_t, 4> weight;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
};

// Reads the block as a Shape; null, or why it is none that a kernel could be for.
inline const char* read_shape(Shape& shape, int64_t cin, const ConvShape (&convs)[3], const ConvShape* shortcut) {
  const auto is = [](const ConvShape& conv, int64_t filter, int64_t stride) {
    const int64_t pad = filter / 2;
    return conv.weight[2] == filter && conv.weight[3] == filter && conv.stride[0] == stride &&
           conv.stride[1] == stride && conv.padding[0] == pad && conv.padding[1] == pad && conv.dilation[0] == 1 &&
           conv.dilation[1] == 1 && conv.groups == 1;
  };
  const int64_t stride = convs[1].stride[0], mid = convs[1].weight[0], cout = convs[2].weight[0];
  if (!is(convs[0], 1, 1) || !is(convs[1], 3, stride) || !is(convs[2], 1, 1)) {
    return "its whole-block kernels are for 1x1, 3x3 and 1x1 convolutions without groups or dilation";
  }
  if (shortcut && !is(*shortcut, 1, stride)) return "the shortcut is not a 1x1 convolution with the block's stride";
  if (convs[0].weight[0] != mid || cin > 65536 || mid > 65536 || cout > 65536) {
    return "no whole-block kernel has these channels, stride and shortcut";
  }
  shape.cin = static_cast<int>(cin), shape.mid = static_cast<int>(mid), shape.cout = static_cast<int>(cout);
  shape.stride = static_cast<int>(stride), shape.project = shortcut != nullptr;
  return nullptr;
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Null, or why the kernels may not be given these sizes.
inline const char* sizes_refusal(const Sizes& sizes) {
  const auto [n, h, w] = sizes;
  constexpr int64_t kHalfRange = int64_t{1} << 30;  // coordinates stay in 32 bits, with room for sums of two
  if (n < 1 || h < 1 || w < 1) return "a size is less than 1";
  if (n >= kHalfRange || h >= kHalfRange || w >= kHalfRange) return "a size is 2^30 or more";
  return nullptr;
}

// A plan for `a`, whose sizes, strides and pointers are set.
inline Plan make_plan(Args a, const Shape& shape, const Limits& limits, Kernel choice = Kernel::kCount) {
  Plan plan;
  const Sizes sizes{a.n, a.h, a.w};
  plan.refusal = sizes_refusal(sizes);
  if (plan.refusal) return plan;
  plan.kernel = kernel_for(shape, sizes, limits, &plan.refusal, choice);
  if (plan.kernel == Kernel::kCount) return plan;
  const KernelInfo& k = info(plan.kernel);
  for (const Conv* conv : {&a.conv1, &a.conv2, &a.conv3, &a.shortcut}) {
    const bool there = conv != &a.shortcut || k.project;
    if (there && (!conv->weight || !conv->mean || !conv->var)) plan.refusal = "a required pointer is null";
    if (!aligned(conv->weight)) plan.refusal = "a weight is not aligned to 16 bytes";
  }
  if (!a.x || !a.out) plan.refusal = "a required pointer is null";
  if (!aligned(a.x) || !aligned(a.out)) plan.refusal = "x or out is not aligned to 16 bytes";
  for (const int64_t stride : {a.x_stride_n, a.x_stride_h, a.x_stride_w}) {
    if (stride % 8 != 0) plan.refusal = "a pixel of x is not aligned to 16 bytes";
  }
  if (plan.refusal) return plan;
  a.p = (a.h - 1) / k.stride + 1, a.q = (a.w - 1) / k.stride + 1;
  const auto [down, across] = tiles_of(k, a.h, a.w);
  a.tiles_h = static_cast<int>(down), a.tiles_w = static_cast<int>(across);
  const int64_t tiles = down * across;
  if (tiles >= (1 << 30) || tiles * a.n >= (1 << 30)) {
    plan.refusal = "2^30 tiles or more";
    return plan;
  }
  a.tiles = static_cast<int>(tiles * a.n);
  constexpr int kReserved = 1 << 10;  // shared memory that the system takes of each block
  const int blocks = std::clamp(limits.multiprocessor / (k.shared_bytes + kReserved), 1, k.blocks);
  plan.grid = static_cast<unsigned>(std::min(a.tiles, blocks * limits.multiprocessors));
  plan.args = a;
  return plan;
}

}  // namespace rf::bottleneck
