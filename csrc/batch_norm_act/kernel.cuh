// Batch norm, residual and ReLU, and their gradient. Forward: statistics of the splits, their merge, which also moves the
// running ones, the output. Backward: sums of the splits, their merge, the full-size gradients. No atomics: the same
// bits every run.
#pragma once

#include "batch_norm_act/walk.cuh"

namespace rf::norm {

// Mean and deviations of some groups in two passes over registers.
template <class T, int V, bool LAST>
RF_DEVICE auto moments_of(const Vector<T, V> (&x)[kUnroll], int groups) {
  constexpr int kChannels = LAST ? V : 1;
  constexpr int kValues = V / kChannels;
  Moments<kChannels> tile;
  tile.count() = static_cast<float>(groups * kValues);
  const float inverse = 1.0f / tile.count();
  RF_UNROLL
  for (int j = 0; j < kChannels; ++j) {
    float sum = 0.0f, squares = 0.0f;
    RF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= groups) break;
      RF_UNROLL
      for (int i = 0; i < kValues; ++i) sum += to_float(x[u].at[j + i]);
    }
    const float mean = sum * inverse;
    RF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= groups) break;
      RF_UNROLL
      for (int i = 0; i < kValues; ++i) {
        const float deviation = to_float(x[u].at[j + i]) - mean;
        squares = fused_multiply_add(deviation, deviation, squares);
      }
    }
    tile.at[j] = mean;
    tile.at[kChannels + j] = squares;
  }
  return tile;
}

template <class T, int V, bool LAST>
RF_KERNEL(kThreads, blocks_at_once(V > 1))
statistics_kernel(RF_CONSTANT Args args) {
  Walker<V, LAST, Direction::kForward> walker(args.walk);
  const T* x = static_cast<const T*>(args.x);
  Moments<walker.kChannels> moments;
  int64_t at[kUnroll];
  while (const int count = walker.next(at)) {
    Vector<T, V> values[kUnroll];
    RF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (u < count) values[u] = load_global<Vector<T, V>>(x + at[u]);
    }
    moments.merge(moments_of<T, V, LAST>(values, count));
  }
  combine(moments, walker.row(), walker.rows());
  store_partial(args, moments, walker);
}

template <class T>
RF_DEVICE void follow(void* running, bool wide, int64_t channel, float value, float factor) {
  const float next = (1.0f - factor) * channel_value<T>(running, wide, channel) + factor * value;
  if (wide) {
    static_cast<float*>(running)[channel] = next;
  } else {
    static_cast<T*>(running)[channel] = from_float<T>(next);
  }
}

// Variance as aten has it: over all values to normalise, over one less for the running one.
template <class T>
RF_KERNEL(kThreads, 4)
merge_statistics_kernel(RF_CONSTANT Args args) {
  const int64_t channel = static_cast<int64_t>(block_x()) * kMergeLanes + thread_x() % kMergeLanes;
  const Moments<1> moments = merge_splits<Moments<1>>(args, channel);
  if (thread_x() >= kMergeLanes || channel >= args.walk.channels) return;
  const float count = static_cast<float>(args.walk.groups * args.walk.values);
  args.batch_mean[channel] = moments.at[0];
  args.batch_scale[channel] = reciprocal_sqrt(moments.at[1] / count + args.eps);
  if (!args.running_mean) return;
  const float factor = args.batches ? 1.0f / static_cast<float>(*args.batches) : args.momentum;
  follow<T>(args.running_mean, args.wide & kWideRunningMean, channel, moments.at[0], factor);
  follow<T>(args.running_var, args.wide & kWideRunningVar, channel, moments.at[1] / (count - 1.0f), factor);
}

template <class T>
RF_DEVICE float mean_of(const Args& args, int64_t channel) {
  return channel_value<T>(args.mean, args.wide & kWideMean, channel);
}

template <class T>
RF_DEVICE float scale_of(const Args& args, int64_t channel) {
  const float value = channel_value<T>(args.scale, args.wide & kWideScale, channel);
  return args.training ? value : reciprocal_sqrt(value + args.eps);
}

template <class T>
RF_DEVICE float gamma_of(const Args& args, int64_t channel) {
  return args.gamma ? channel_value<T>(args.gamma, args.wide & kWideGamma, channel) : 1.0f;
}

template <class T, int V, bool LAST>
RF_KERNEL(kThreads, blocks_at_once(V > 1))
apply_kernel(RF_CONSTANT Args args) {
  Walker<V, LAST, Direction::kBackward> walker(args.walk);
  if (walker.channel() >= args.walk.channels) return;
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* out = static_cast<T*>(args.out);
  float mean[walker.kChannels], scale[walker.kChannels], beta[walker.kChannels];
  RF_UNROLL
  for (int j = 0; j < walker.kChannels; ++j) {
    const int64_t channel = walker.channel() + j;
    mean[j] = mean_of<T>(args, channel);
    scale[j] = scale_of<T>(args, channel) * gamma_of<T>(args, channel);
    beta[j] = args.beta ? channel_value<T>(args.beta, args.wide & kWideBeta, channel) : 0.0f;
  }
  int64_t at[kUnroll];
  while (const int count = walker.next(at)) {
    Vector<T, V> values[kUnroll], addends[kUnroll];
    RF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      values[u] = load_global<Vector<T, V>>(x + at[u]);
      if (residual) addends[u] = load_global<Vector<T, V>>(residual + at[u]);
    }
    RF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      Vector<T, V> result;
      RF_UNROLL
      for (int i = 0; i < V; ++i) {
        const int j = LAST ? i : 0;
        float y = fused_multiply_add(to_float(values[u].at[i]) - mean[j], scale[j], beta[j]);
        if (residual) y += to_float(addends[u].at[i]);
        if (args.relu) y = y < 0.0f ? 0.0f : y;  // keeps NaN
        result.at[i] = from_float<T>(y);
      }
      store_global(out + at[u], result);
    }
  }
}

// aten's threshold_backward: a NaN output lets the gradient pass.
template <class T>
RF_DEVICE float masked(T grad, bool relu, T output) {
  return relu && to_float(output) <= 0.0f ? 0.0f : to_float(grad);
}

template <class T, int V, bool LAST>
RF_KERNEL(kThreads, blocks_at_once(V > 1))
sums_kernel(RF_CONSTANT Args args) {
  Walker<V, LAST, Direction::kForward> walker(args.walk);
  const T* x = static_cast<const T*>(args.x);
  const T* grad = static_cast<const T*>(args.grad);
  const T* output = static_cast<const T*>(args.output);
  constexpr int kChannels = walker.kChannels;
  float mean[kChannels] = {};
  RF_UNROLL
  for (int j = 0; j < kChannels; ++j) {
    if (walker.channel() < args.walk.channels) mean[j] = mean_of<T>(args, walker.channel() + j);
  }
  Sums<kChannels> sums;
  int64_t at[kUnroll];
  while (const int count = walker.next(at)) {
    Vector<T, V> values[kUnroll], grads[kUnroll], outputs[kUnroll];
    RF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      values[u] = load_global<Vector<T, V>>(x + at[u]);
      grads[u] = load_global<Vector<T, V>>(grad + at[u]);
      if (output) outputs[u] = load_global<Vector<T, V>>(output + at[u]);
    }
    RF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      RF_UNROLL
      for (int i = 0; i < V; ++i) {
        const int j = LAST ? i : 0;
        const float g = masked(grads[u].at[i], output != nullptr, outputs[u].at[i]);
        sums.at[j] += g;
        sums.at[kChannels + j] = fused_multiply_add(g, to_float(values[u].at[i]) - mean[j], sums.at[kChannels + j]);
      }
    }
  }
  combine(sums, walker.row(), walker.rows());
  store_partial(args, sums, walker);
}

template <class T>
RF_KERNEL(kThreads, 4)
merge_sums_kernel(RF_CONSTANT Args args) {
  const int64_t channel = static_cast<int64_t>(block_x()) * kMergeLanes + thread_x() % kMergeLanes;
  const Sums<1> sums = merge_splits<Sums<1>>(args, channel);
  if (thread_x() >= kMergeLanes || channel >= args.walk.channels) return;
  args.dbeta[channel] = sums.value(0);
  args.dgamma[channel] = sums.value(1) * scale_of<T>(args, channel);
}

// dx = (g − (Σg + x̂·Σg·x̂)/M)·r·gamma, with given statistics g·r·gamma; dresidual = g.
template <class T, int V, bool LAST>
RF_KERNEL(kThreads, blocks_at_once(V > 1))
gradient_kernel(RF_CONSTANT Args args) {
  Walker<V, LAST, Direction::kBackward> walker(args.walk);
  if (walker.channel() >= args.walk.channels) return;
  const T* x = static_cast<const T*>(args.x);
  const T* grad = static_cast<const T*>(args.grad);
  const T* output = static_cast<const T*>(args.output);
  T* dx = static_cast<T*>(args.dx);
  T* dresidual = static_cast<T*>(args.dresidual);
  const bool centre = dx && args.training;
  constexpr int kChannels = walker.kChannels;
  float mean[kChannels], scale[kChannels], shift[kChannels], slope[kChannels];
  const float inverse = 1.0f / static_cast<float>(args.walk.groups * args.walk.values);
  RF_UNROLL
  for (int j = 0; j < kChannels; ++j) {
    const int64_t channel = walker.channel() + j;
    const float r = scale_of<T>(args, channel);
    mean[j] = mean_of<T>(args, channel);
    scale[j] = r * gamma_of<T>(args, channel);
    shift[j] = args.dbeta[channel] * inverse;
    slope[j] = args.dgamma[channel] * inverse * r;
  }
  constexpr int kAhead = kUnroll / 2;
  int64_t at[kAhead];
  while (const int count = walker.next(at)) {
    Vector<T, V> values[kAhead], grads[kAhead], outputs[kAhead];
    RF_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      if (u >= count) break;
      grads[u] = load_global<Vector<T, V>>(grad + at[u]);
      if (centre) values[u] = load_global<Vector<T, V>>(x + at[u]);
      if (output) outputs[u] = load_global<Vector<T, V>>(output + at[u]);
    }
    RF_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      if (u >= count) break;
      Vector<T, V> passed, result;
      RF_UNROLL
      for (int i = 0; i < V; ++i) {
        const int j = LAST ? i : 0;
        float g = masked(grads[u].at[i], output != nullptr, outputs[u].at[i]);
        passed.at[i] = from_float<T>(g);
        if (centre) g = fused_multiply_add(mean[j] - to_float(values[u].at[i]), slope[j], g - shift[j]);
        result.at[i] = from_float<T>(g * scale[j]);
      }
      if (dresidual) store_global(dresidual + at[u], passed);
      if (dx) store_global(dx + at[u], result);
    }
  }
}

}  // namespace rf::norm
