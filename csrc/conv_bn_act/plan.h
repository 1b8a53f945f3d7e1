// Which kernel runs a problem, and how: plain host C++, no CUDA header.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "conv_bn_act/args.h"
#include "conv_bn_act/instances.h"

namespace rf::conv {

enum class Precision { kTensorCore, kIeee };  // of float32 products; half types always take the tensor cores

#define RF_CONV_ID(name, ...) k_##name,
enum class Kernel : int { RF_CONV_KERNELS(RF_CONV_ID) kCount };
#undef RF_CONV_ID

struct KernelInfo {
  const char* name;
  Element element;
  Precision precision;
  int bm, bn, step, threads, copy;  // step and copy in elements
  int shared_bytes;
};

namespace detail {
struct bf16 {
  static constexpr Element kElement = Element::kBF16;
};
struct fp16 {
  static constexpr Element kElement = Element::kFP16;
};
struct fp32 {
  static constexpr Element kElement = Element::kFP32;
};
template <class T>
struct ElementOf : T {};
template <>
struct ElementOf<float> : fp32 {};

struct TensorCore {
  static constexpr Precision kPrecision = Precision::kTensorCore;
  static constexpr int threads(int m, int n) { return m * n * 32; }
  static constexpr int slice_rows(int m) { return m * 16; }
  static constexpr int slice_pitch(int bn, int) { return bn + 8; }
};
struct Ieee {
  static constexpr Precision kPrecision = Precision::kIeee;
  static constexpr int threads(int m, int n) { return m * n; }
  static constexpr int slice_rows(int m) { return m; }
  static constexpr int slice_pitch(int bn, int n) { return bn + n; }
};

#define RF_CONV_INFO(name, element, math, bm, bn, row_bytes, grid_m, grid_n, stages, copy, blocks) \
  KernelInfo{#name,                                                                                \
             ElementOf<element>::kElement,                                                         \
             math::kPrecision,                                                                     \
             bm,                                                                                   \
             bn,                                                                                   \
             row_bytes / element_bytes(ElementOf<element>::kElement),                              \
             math::threads(grid_m, grid_n),                                                        \
             copy,                                                                                 \
             std::max(stages * (bm + bn) * row_bytes,                                              \
                      math::slice_rows(grid_m) * math::slice_pitch(bn, grid_n) * 4)},
inline constexpr KernelInfo kKernels[] = {RF_CONV_KERNELS(RF_CONV_INFO)};
#undef RF_CONV_INFO
}  // namespace detail

constexpr int kKernelCount = static_cast<int>(Kernel::kCount);
constexpr const KernelInfo& info(Kernel kernel) { return detail::kKernels[static_cast<int>(kernel)]; }

struct Plan {
  const char* refusal = nullptr;  // why nothing can run, else null
  Kernel kernel = Kernel::kCount;
  Args args{};  // with the plan's fields set; the caller sets workspace
  unsigned grid_x = 0, grid_z = 0;
  unsigned threads = 0, shared_bytes = 0;
  size_t workspace_bytes = 0;  // 0: no split, no reduce kernel
  unsigned reduce_grid = 0;    // blocks of kReduceThreads
};

// Overrides for tests and tuning; the defaults leave the choice to the plan.
struct Choice {
  Kernel kernel = Kernel::kCount;
  int splits = 0;
};

// The kernel of this name, or kCount.
inline Kernel kernel_named(const char* name) {
  for (int i = 0; i < kKernelCount; ++i) {
    if (std::strcmp(name, detail::kKernels[i].name) == 0) return static_cast<Kernel>(i);
  }
  return Kernel::kCount;
}

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Sets what the sizes say: x [N, C, H, W], weight [K, C/groups, R, S], the pairs (height, width). Null, or a refusal.
inline const char* set_sizes(Args& a, const int64_t* x, const int64_t* weight, const int64_t* stride,
                             const int64_t* padding, const int64_t* dilation, int64_t groups) {
  constexpr int64_t kHalfRange = int64_t{1} << 30;
  for (const int64_t value : {x[1], x[2], x[3], weight[0], weight[2], weight[3], stride[0], stride[1], padding[0],
                              padding[1], dilation[0], dilation[1], groups}) {
    if (value < 0 || value >= kHalfRange) return "a size is negative, or 2^30 or more";
  }
  if (stride[0] < 1 || stride[1] < 1) return "stride is less than 1";
  const auto out = [&](int i) {
    const int64_t room = x[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1;
    return static_cast<int>(room < 0 ? 0 : room / stride[i] + 1);
  };
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  a.n = x[0], a.c = narrow(x[1]), a.h = narrow(x[2]), a.w = narrow(x[3]);
  a.k = narrow(weight[0]), a.r = narrow(weight[2]), a.s = narrow(weight[3]);
  a.p = out(0), a.q = out(1);
  a.stride_h = narrow(stride[0]), a.stride_w = narrow(stride[1]);
  a.pad_h = narrow(padding[0]), a.pad_w = narrow(padding[1]);
  a.dilation_h = narrow(dilation[0]), a.dilation_w = narrow(dilation[1]);
  a.groups = narrow(groups);
  return nullptr;
}

// Null, or why no kernel here may be given this problem.
inline const char* refusal(const Args& a, Element element) {
  const size_t bytes = element_bytes(element);
  if (a.n < 1 || a.h < 1 || a.w < 1 || a.c < 1 || a.k < 1 || a.r < 1 || a.s < 1 || a.p < 1 || a.q < 1) {
    return "a size is less than 1";
  }
  if (a.stride_h < 1 || a.stride_w < 1 || a.dilation_h < 1 || a.dilation_w < 1 || a.pad_h < 0 || a.pad_w < 0) {
    return "stride or dilation is less than 1, or padding negative";
  }
  if (a.groups < 1 || a.c % a.groups != 0 || a.k % a.groups != 0) return "groups does not divide the channels";
  if (!a.x || !a.weight || !a.mean || !a.var || !a.out) return "a required pointer is null";
  for (const void* pointer : {a.x, a.weight, a.residual, static_cast<const void*>(a.out)}) {
    if (!aligned(pointer, bytes)) return "a pointer is not aligned to its element";
  }
  constexpr int64_t kHalfRange = int64_t{1} << 30;  // coordinates stay in 32 bits, with room for sums of two
  const int64_t reach_h = static_cast<int64_t>(a.p) * a.stride_h + static_cast<int64_t>(a.r) * a.dilation_h;
  const int64_t reach_w = static_cast<int64_t>(a.q) * a.stride_w + static_cast<int64_t>(a.s) * a.dilation_w;
  if (reach_h + a.pad_h >= kHalfRange || reach_w + a.pad_w >= kHalfRange) return "an image side is 2^30 or more";
  if (static_cast<int64_t>(a.p) * a.q >= kHalfRange) return "an output image has 2^30 pixels or more";
  if (static_cast<int64_t>(a.r) * a.s * (a.c / a.groups) >= kHalfRange) return "the reduction has 2^30 terms or more";
  if (a.groups > 65535) return "more than 65535 groups";
  const int64_t rows = a.n * a.p * a.q;
  if ((rows + 63) / 64 * ((a.k / a.groups + 31) / 32) > 0x7fffffff) return "more than 2^31 - 1 tiles";
  return nullptr;
}

// Elements that one asynchronous copy may move without leaving a tap or its alignment: 8, 4 or 1.
inline int copy_elements(const Args& a, Element element) {
  const int bytes = element_bytes(element);
  const int channels = a.c / a.groups;
  for (const int copy : {8, 4}) {
    if (copy * bytes > 16) continue;
    const bool strides = a.x_stride_n % copy == 0 && a.x_stride_h % copy == 0 && a.x_stride_w % copy == 0;
    if (channels % copy == 0 && strides && aligned(a.x, copy * bytes) && aligned(a.weight, copy * bytes)) return copy;
  }
  return 1;
}

// A plan for `a` on a device of `multiprocessors`; refusal is set when there is none. `strides_fit` of the residual and
// the output are looked at, not assumed: anything misaligned takes element-wise stores.
inline Plan make_plan(Args a, Element element, Precision precision, int multiprocessors, Choice choice = {}) {
  Plan plan;
  plan.refusal = refusal(a, element);
  if (plan.refusal) return plan;
  if (element != Element::kFP32) precision = Precision::kTensorCore;

  const int vector = 16 / element_bytes(element);
  const int channels_out = a.k / a.groups;
  a.vector_out = channels_out % vector == 0 && a.out_stride % vector == 0 && aligned(a.out, 16) &&
                 (!a.residual || (a.residual_stride % vector == 0 && aligned(a.residual, 16)));
  const int copy = copy_elements(a, element);
  const int64_t rows = a.n * a.p * a.q;
  const int64_t depth = static_cast<int64_t>(a.r) * a.s * (a.c / a.groups);

  // A tile costs its products and, at the rate of kEdge products per row, the reading of its two edges; blocks run in
  // waves over the multiprocessors. This ranks tiles by shape alone: a model, to be replaced by a tuning table.
  constexpr double kEdge = 32;
  double best = 0;
  int usable_copy = 0;
  for (int i = 0; i < kKernelCount; ++i) {
    const KernelInfo& k = detail::kKernels[i];
    if (k.element == element && k.precision == precision && copy % k.copy == 0) {
      usable_copy = std::max(usable_copy, k.copy);
    }
  }
  for (int i = 0; i < kKernelCount; ++i) {
    const KernelInfo& k = detail::kKernels[i];
    const auto kernel = static_cast<Kernel>(i);
    const bool fits = k.element == element && k.precision == precision && copy % k.copy == 0;
    if (choice.kernel != Kernel::kCount ? kernel != choice.kernel : k.copy != usable_copy) continue;
    if (!fits) continue;
    const int64_t tiles_m = (rows + k.bm - 1) / k.bm;
    const int64_t tiles_n = (channels_out + k.bn - 1) / k.bn;
    const int64_t blocks = tiles_m * tiles_n * a.groups;
    if (tiles_m * tiles_n > 0x7fffffff) continue;
    const auto steps = static_cast<int>((depth + k.step - 1) / k.step);

    // Split the reduction while multiprocessors would idle, but never below eight steps a block: the partial sums cost
    // a write and a read each.
    int splits = choice.splits;
    if (splits == 0)
      splits = static_cast<int>(std::min<int64_t>(multiprocessors / std::max<int64_t>(blocks, 1), steps / 8));
    splits = std::clamp(splits, 1, std::min(steps, 65535 / a.groups));
    const int steps_per_split = (steps + splits - 1) / splits;
    splits = (steps + steps_per_split - 1) / steps_per_split;
    const int64_t waves = (blocks * splits + multiprocessors - 1) / multiprocessors;
    const double cost = static_cast<double>(waves) * steps_per_split * k.step *
                        (static_cast<double>(k.bm) * k.bn + kEdge * (k.bm + k.bn));
    if (plan.kernel != Kernel::kCount && cost >= best) continue;
    best = cost;
    plan.kernel = kernel;
    plan.grid_x = static_cast<unsigned>(tiles_m * tiles_n);
    plan.grid_z = static_cast<unsigned>(a.groups * splits);
    plan.threads = k.threads;
    plan.shared_bytes = k.shared_bytes;
    a.splits = splits;
    a.steps_per_split = steps_per_split;
    a.tiles_n = static_cast<int>(tiles_n);
  }
  if (plan.kernel == Kernel::kCount) {
    plan.refusal = "the kernel asked for does not fit the problem's dtype, alignment or channels";
    return plan;
  }
  if (a.splits > 1) {
    plan.workspace_bytes = static_cast<size_t>(a.splits) * rows * a.k * sizeof(float);
    const int64_t chunks = rows * ((a.k + vector - 1) / vector);
    plan.reduce_grid = static_cast<unsigned>(std::min<int64_t>((chunks + 255) / 256, int64_t{8} * multiprocessors));
  }
  plan.args = a;
  return plan;
}

}  // namespace rf::conv
