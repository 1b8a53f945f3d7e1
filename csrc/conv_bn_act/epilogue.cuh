// What happens to a finished sum: batch norm, residual, ReLU, one rounding, a 16-byte store.
#pragma once

#include "common/primitives.cuh"
#include "conv_bn_act/args.h"

namespace rf::conv {

// The batch norm of V neighbouring channels, read once and applied to every row a thread stores.
template <class T, int V>
struct ChannelAffine {
  float scale[V], shift[V];

  RF_DEVICE void load(const Args& args, int first, int count) {
    RF_UNROLL
    for (int i = 0; i < V; ++i) {
      if (i >= count) break;
      const int k = first + i;
      const float bias = args.bias ? channel_value<T>(args.bias, args.wide & kWideBias, k) : 0.0f;
      const float gamma = args.gamma ? channel_value<T>(args.gamma, args.wide & kWideGamma, k) : 1.0f;
      const float beta = args.beta ? channel_value<T>(args.beta, args.wide & kWideBeta, k) : 0.0f;
      const float mean = channel_value<T>(args.mean, args.wide & kWideMean, k);
      scale[i] = reciprocal_sqrt(channel_value<T>(args.var, args.wide & kWideVar, k) + args.eps) * gamma;
      shift[i] = fused_multiply_add(bias - mean, scale[i], beta);
    }
  }
};

// Finishes the sums of row m, channels first to first + count, and writes them.
template <class T, int V>
RF_DEVICE void finish(const Args& args, const ChannelAffine<T, V>& affine, const float (&sum)[V], int64_t m, int first,
                      int count) {
  const T* residual =
      args.residual ? static_cast<const T*>(args.residual) + (m * args.residual_stride + first) : nullptr;
  T* out = static_cast<T*>(args.out) + (m * args.out_stride + first);
  Vector<T, V> addend{};
  if (residual && args.vector_out) addend = load_global<Vector<T, V>>(residual);
  Vector<T, V> result;
  RF_UNROLL
  for (int i = 0; i < V; ++i) {
    if (i >= count) break;
    float y = fused_multiply_add(sum[i], affine.scale[i], affine.shift[i]);
    if (residual) y += to_float(args.vector_out ? addend.at[i] : residual[i]);
    if (args.relu) y = y < 0.0f ? 0.0f : y;
    result.at[i] = from_float<T>(y);
  }
  if (args.vector_out) {
    store_global(out, result);
    return;
  }
  RF_UNROLL
  for (int i = 0; i < V; ++i) {
    if (i < count) out[i] = result.at[i];
  }
}

// Writes unfinished sums to this split's part of the workspace.
template <int V>
RF_DEVICE void store_partial(const Args& args, const float (&sum)[V], int split, int64_t m, int first, int count) {
  const int64_t rows = args.n * args.p * args.q;
  float* to = args.workspace + ((split * rows + m) * args.k + first);
  RF_UNROLL
  for (int i = 0; i < V; i += 4) {
    if (args.vector_out) {
      store_global(to + i, Vector<float, 4>{{sum[i], sum[i + 1], sum[i + 2], sum[i + 3]}});
      continue;
    }
    RF_UNROLL
    for (int j = i; j < i + 4; ++j) {
      if (j < count) to[j] = sum[j];
    }
  }
}

constexpr int kReduceThreads = 256;

// Adds the partial sums of all splits, always in the same order, and finishes them.
template <class T>
RF_KERNEL(kReduceThreads, 1)
reduce_kernel(RF_CONSTANT Args args) {
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  const int64_t rows = args.n * args.p * args.q;
  const int chunks = (args.k + V - 1) / V;
  const int64_t total = rows * chunks;
  const int64_t step = static_cast<int64_t>(grid_x()) * kReduceThreads;
  for (int64_t i = static_cast<int64_t>(block_x()) * kReduceThreads + thread_x(); i < total; i += step) {
    const int64_t m = i / chunks;
    const int first = static_cast<int>(i - m * chunks) * V;
    const int count = args.k - first < V ? args.k - first : V;
    float sum[V] = {};
    for (int split = 0; split < args.splits; ++split) {
      const float* from = args.workspace + ((split * rows + m) * args.k + first);
      RF_UNROLL
      for (int j = 0; j < V; j += 4) {
        Vector<float, 4> part{};
        if (args.vector_out) {
          part = load_global<Vector<float, 4>>(from + j);
        } else {
          RF_UNROLL
          for (int l = 0; l < 4; ++l) {
            if (j + l < count) part.at[l] = from[j + l];
          }
        }
        RF_UNROLL
        for (int l = 0; l < 4; ++l) sum[j + l] += part.at[l];
      }
    }
    ChannelAffine<T, V> affine;
    affine.load(args, first, count);
    finish<T, V>(args, affine, sum, m, first, count);
  }
}

}  // namespace rf::conv
