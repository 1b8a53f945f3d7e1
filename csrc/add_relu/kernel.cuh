// relu(a + b), its in-place form (out is a) and its backward, in one pass over memory.
#pragma once

#include "add_relu/args.h"
#include "common/primitives.cuh"

namespace rf::add_relu {

struct AddRelu {
  RF_DEVICE static float apply(float a, float b) {
    const float sum = a + b;
    return sum < 0.0f ? 0.0f : sum;  // keeps NaN
  }
};

// a is the gradient of the output, b the output: aten's threshold_backward, where a NaN output lets the gradient pass.
struct ReluBackward {
  RF_DEVICE static float apply(float gradient, float output) { return output <= 0.0f ? 0.0f : gradient; }
};

// In float32, rounded once: rounding keeps the order, so a ReLU before it gives what a ReLU after it would.
template <class T, class Op>
RF_DEVICE T apply(T a, T b) {
  return from_float<T>(Op::apply(to_float(a), to_float(b)));
}

// V elements to an access; V = 1 where the three pointers cannot be aligned together.
template <class T, class Op, int V>
RF_KERNEL(kThreads, 1)
flat_kernel(RF_CONSTANT FlatArgs args) {
  const T* a = static_cast<const T*>(args.a);
  const T* b = static_cast<const T*>(args.b);
  T* out = static_cast<T*>(args.out);
  const int64_t vectors = (args.count - args.head) / V;
  const int64_t first = static_cast<int64_t>(block_x()) * (kThreads * kUnroll) + thread_x();

  Vector<T, V> va[kUnroll], vb[kUnroll];
  RF_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    if (i >= vectors) break;
    va[u] = load_global<Vector<T, V>>(a + (args.head + i * V));
    vb[u] = load_global<Vector<T, V>>(b + (args.head + i * V));
  }
  RF_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    if (i >= vectors) break;
    Vector<T, V> result;
    RF_UNROLL
    for (int e = 0; e < V; ++e) result.at[e] = apply<T, Op>(va[u].at[e], vb[u].at[e]);
    store_global(out + (args.head + i * V), result);
  }
  if constexpr (V > 1) {  // what no full vector covers, at both ends: fewer than 2·V elements
    if (block_x() != 0) return;
    if (thread_x() < args.head) out[thread_x()] = apply<T, Op>(a[thread_x()], b[thread_x()]);
    const int64_t last = args.head + vectors * V + thread_x();
    if (last < args.count) out[last] = apply<T, Op>(a[last], b[last]);
  }
}

template <class T, class Op>
RF_KERNEL(kThreads, 1)
strided_kernel(RF_CONSTANT StridedArgs args) {
  const int64_t step = static_cast<int64_t>(grid_x()) * kThreads;
  for (int64_t i = static_cast<int64_t>(block_x()) * kThreads + thread_x(); i < args.count; i += step) {
    int64_t rest = i, at_a = 0, at_b = 0, at_out = 0;
    RF_UNROLL
    for (int d = kMaxDims - 1; d >= 0; --d) {
      if (rest == 0) break;
      const int64_t size = args.size[d];
      const bool small = rest <= 0x7fffffff && size <= 0x7fffffff;  // a 32-bit division is several times faster
      const int64_t next =
          small ? static_cast<int64_t>(static_cast<uint32_t>(rest) / static_cast<uint32_t>(size)) : rest / size;
      const int64_t index = rest - next * size;
      at_a += index * args.stride_a[d];
      at_b += index * args.stride_b[d];
      at_out += index * args.stride_out[d];
      rest = next;
    }
    static_cast<T*>(args.out)[at_out] =
        apply<T, Op>(static_cast<const T*>(args.a)[at_a], static_cast<const T*>(args.b)[at_b]);
  }
}

}  // namespace rf::add_relu
