// Which add_relu kernel runs a problem, and how: plain host C++, no CUDA header.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "add_relu/args.h"

namespace rf::add_relu {

// Three tensors of one shape; strides in elements, any order.
struct Problem {
  const void* a;
  const void* b;
  void* out;
  int element_bytes;
  int dims;
  const int64_t* size;
  const int64_t* stride_a;
  const int64_t* stride_b;
  const int64_t* stride_out;
};

struct Plan {
  const char* refusal = nullptr;
  bool strided = false;
  bool vectors = false;  // of a flat plan: 16-byte accesses, else one element at a time
  FlatArgs flat{};
  StridedArgs dims{};
  unsigned grid = 0;  // blocks of kThreads; 0: nothing to do
};

// Null, or why the strided kernel may not be given this problem. `dims` gets the merged dimensions.
inline const char* merge_dims(const Problem& problem, StridedArgs& dims) {
  struct Dim {
    int64_t size, a, b, out;
  };
  Dim merged[64];
  int count = 0;
  dims = {problem.a, problem.b, problem.out, 1, {}, {}, {}, {}};
  if (problem.dims > 64) return "more than 64 dimensions";
  for (int d = 0; d < problem.dims; ++d) {
    if (problem.size[d] < 0) return "a size is negative";
    dims.count *= problem.size[d];
    if (problem.size[d] == 1) continue;
    if (problem.stride_out[d] == 0 && problem.size[d] > 1) return "the output overlaps itself";
    merged[count++] = {problem.size[d], problem.stride_a[d], problem.stride_b[d], problem.stride_out[d]};
  }
  std::stable_sort(merged, merged + count, [](const Dim& l, const Dim& r) { return l.out > r.out; });
  int kept = 0;
  for (int d = 0; d < count; ++d) {
    Dim& inner = merged[d];
    if (kept > 0) {
      Dim& outer = merged[kept - 1];
      if (outer.a == inner.a * inner.size && outer.b == inner.b * inner.size && outer.out == inner.out * inner.size) {
        outer = {outer.size * inner.size, inner.a, inner.b, inner.out};
        continue;
      }
    }
    merged[kept++] = inner;
  }
  if (kept > kMaxDims) return "more than 5 dimensions that cannot be merged";
  for (int d = 0; d < kMaxDims; ++d) {
    const int from = d - (kMaxDims - kept);
    const Dim dim = from < 0 ? Dim{1, 0, 0, 0} : merged[from];
    dims.size[d] = dim.size;
    dims.stride_a[d] = dim.a;
    dims.stride_b[d] = dim.b;
    dims.stride_out[d] = dim.out;
  }
  return nullptr;
}

inline Plan make_plan(const Problem& problem, int multiprocessors) {
  Plan plan;
  const auto bytes = static_cast<uintptr_t>(problem.element_bytes);
  const uintptr_t address[] = {reinterpret_cast<uintptr_t>(problem.a), reinterpret_cast<uintptr_t>(problem.b),
                               reinterpret_cast<uintptr_t>(problem.out)};
  for (const uintptr_t pointer : address) {
    if (pointer % bytes != 0) plan.refusal = "a pointer is not aligned to its element";
  }
  if (plan.refusal) return plan;
  plan.refusal = merge_dims(problem, plan.dims);
  if (plan.refusal || plan.dims.count == 0) return plan;

  const int64_t count = plan.dims.count;
  constexpr int kInner = kMaxDims - 1;
  const bool one_dim = plan.dims.size[kInner] == count;
  const bool dense =
      plan.dims.stride_a[kInner] == 1 && plan.dims.stride_b[kInner] == 1 && plan.dims.stride_out[kInner] == 1;
  plan.strided = count > 1 && !(one_dim && dense);
  if (plan.strided) {
    // Eight blocks of 256 threads fill a multiprocessor; each then walks the grid.
    plan.grid =
        static_cast<unsigned>(std::min<int64_t>((count + kThreads - 1) / kThreads, int64_t{8} * multiprocessors));
    return plan;
  }
  const uintptr_t misalignment = address[2] % 16;
  plan.vectors = address[0] % 16 == misalignment && address[1] % 16 == misalignment;
  const int64_t head = plan.vectors ? static_cast<int64_t>((16 - misalignment) % 16 / bytes) : 0;
  plan.flat = {problem.a, problem.b, problem.out, count, static_cast<int>(std::min(head, count))};
  const int64_t per_block = int64_t{kThreads} * kUnroll * (plan.vectors ? 16 / problem.element_bytes : 1);
  const int64_t blocks = (count - plan.flat.head + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) {
    plan.refusal = "more elements than a grid can hold";
    return plan;
  }
  plan.grid = static_cast<unsigned>(std::max<int64_t>(blocks, 1));
  return plan;
}

}  // namespace rf::add_relu
