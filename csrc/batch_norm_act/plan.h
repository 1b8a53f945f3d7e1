// Which batch_norm_act kernels run a problem, and how: plain host C++, no CUDA header.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "batch_norm_act/args.h"

namespace rf::norm {

enum class Element { kBF16, kFP16, kFP32 };
enum class Operation { kForward, kApply, kBackward };  // kApply: the output alone, by statistics that are known

constexpr int element_bytes(Element element) { return element == Element::kFP32 ? 4 : 2; }

// Dense tensors [n, c, h, w], all channels_last or all NCHW.
struct Shape {
  int64_t n, c, h, w;
  bool channels_last;
};

struct Plan {
  const char* refusal = nullptr;  // why nothing can run, else null
  Args args{};                    // with the walk set; the caller sets partial
  bool channels_last = false;     // how the kernels see it
  bool vectors = false;           // 16-byte accesses, else one element at a time
  unsigned grid = 0;              // blocks of kThreads; 0: nothing to do
  unsigned merge_grid = 0;
  size_t workspace_bytes = 0;  // of args.partial, for kForward and kBackward
};

// Null, or why no kernel here may be given this problem.
inline const char* refusal(const Args& a, const Shape& s, Element element, Operation operation) {
  constexpr int64_t kHalfRange = int64_t{1} << 30;  // of a side: products of two stay far from 2^63
  for (const int64_t size : {s.c, s.h, s.w}) {
    if (size < 0 || size >= kHalfRange) return "a size is negative, or 2^30 or more";
  }
  if (s.n < 0 || s.n > INT64_MAX / std::max<int64_t>(1, 8 * s.c * s.h) / std::max<int64_t>(1, s.w)) {
    return "more elements than 64-bit offsets reach";
  }
  if (operation == Operation::kForward && s.n * s.h * s.w == 1) return "one value per channel has no variance";
  const bool backward = operation == Operation::kBackward;
  const bool missing = !a.x || (backward ? !a.grad || !a.dgamma || !a.dbeta : !a.out);
  if (missing || (operation == Operation::kForward ? !a.batch_mean || !a.batch_scale : !a.mean || !a.scale)) {
    return "a required pointer is null";
  }
  for (const void* pointer : {a.x, a.residual, a.grad, a.output, const_cast<const void*>(a.out),
                              const_cast<const void*>(a.dx), const_cast<const void*>(a.dresidual)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % element_bytes(element) != 0) {
      return "a pointer is not aligned to its element";
    }
  }
  return nullptr;
}

inline Plan make_plan(const Args& args, Shape shape, Element element, Operation operation, int multiprocessors) {
  Plan plan;
  plan.refusal = refusal(args, shape, element, operation);
  if (plan.refusal || shape.n * shape.c * shape.h * shape.w == 0) return plan;
  plan.args = args;
  if (operation == Operation::kForward) {  // normalises by what it has just written
    plan.args.mean = args.batch_mean;
    plan.args.scale = args.batch_scale;
    plan.args.wide |= kWideMean | kWideScale;
  }
  // One pixel to an image is channels_last whatever the strides say; one channel is one long image.
  int64_t images = shape.n, pixels = shape.h * shape.w;
  plan.channels_last = shape.c > 1 && (shape.channels_last || pixels == 1);
  if (shape.c == 1) pixels *= images, images = 1;

  uintptr_t address = 0;
  for (const void* pointer : {args.x, args.residual, args.grad, args.output, const_cast<const void*>(args.out),
                              const_cast<const void*>(args.dx), const_cast<const void*>(args.dresidual)}) {
    address |= reinterpret_cast<uintptr_t>(pointer);
  }
  const int vector = 16 / element_bytes(element);
  plan.vectors = address % 16 == 0 && (plan.channels_last ? shape.c : pixels) % vector == 0;
  const int width = plan.vectors ? vector : 1;

  Walk& walk = plan.args.walk;
  walk = {};
  walk.channels = shape.c;
  const int64_t lane_channels = plan.channels_last ? width : 1;
  if (plan.channels_last) {  // lanes beside one another on the channels of a pixel, a power of two up to a warp
    while (walk.lanes_log2 < 5 && lane_channels << walk.lanes_log2 < shape.c) ++walk.lanes_log2;
  }
  const int64_t chunk = lane_channels << walk.lanes_log2;
  const int rows = kThreads >> walk.lanes_log2;
  walk.chunks = static_cast<int>((shape.c + chunk - 1) / chunk);
  walk.values = static_cast<int>(width / lane_channels);
  walk.plane_groups = plan.channels_last ? images * pixels : pixels / width;
  walk.groups = plan.channels_last ? images * pixels : images * (pixels / width);

  // As many blocks as the device holds at once, each with whole steps of all its rows; no GPU has timed it.
  const int64_t step = int64_t{rows} * kUnroll;
  const int64_t steps = (walk.groups + step - 1) / step;
  const int64_t wanted = std::clamp<int64_t>(int64_t{blocks_at_once(plan.vectors)} * multiprocessors / walk.chunks, 1, steps);
  walk.strip = (steps + wanted - 1) / wanted * step;
  walk.splits = static_cast<int>((walk.groups + walk.strip - 1) / walk.strip);

  walk.plane = plan.channels_last ? 1 : pixels;
  const int64_t image = shape.c * pixels;
  if (plan.channels_last) {
    walk.step = rows * shape.c;
    walk.last = (walk.groups - 1) * shape.c;
  } else {
    walk.step_groups = rows % walk.plane_groups;
    walk.step = rows / walk.plane_groups * image + walk.step_groups * width;
    walk.carry = image - pixels;
    walk.last = (images - 1) * image + pixels - width;
  }
  const int64_t blocks = int64_t{walk.chunks} * walk.splits;
  if (blocks > 0x7fffffff) {
    plan.refusal = "more blocks than a grid can hold";
    return plan;
  }
  plan.grid = static_cast<unsigned>(blocks);
  plan.merge_grid = static_cast<unsigned>((shape.c + kMergeLanes - 1) / kMergeLanes);
  if (operation != Operation::kApply) plan.workspace_bytes = size_t{2} * walk.splits * shape.c * sizeof(float);
  return plan;
}

}  // namespace rf::norm
