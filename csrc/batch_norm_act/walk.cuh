// How a thread walks its channels, and how the threads of a block bring their sums together.
#pragma once

#include <type_traits>

#include "batch_norm_act/args.h"
#include "common/primitives.cuh"

namespace rf::norm {

enum class Direction { kForward, kBackward };

// V elements to an access; LAST: channels_last. A pass that follows another walks backward: what that one read last is
// still in the cache.
template <int V, bool LAST, Direction DIRECTION>
class Walker {
 public:
  static constexpr int kChannels = LAST ? V : 1;  // of this thread

  RF_DEVICE explicit Walker(const Walk& walk)
      : walk_(walk), row_(thread_x() >> walk.lanes_log2), rows_(kThreads >> walk.lanes_log2) {
    const int chunk = block_x() % walk.chunks;
    split_ = block_x() / walk.chunks;
    const int lane = thread_x() & ((1 << walk.lanes_log2) - 1);
    channel_ = ((static_cast<int64_t>(chunk) << walk.lanes_log2) + lane) * kChannels;
    const int64_t begin = split_ * walk.strip;
    const int64_t end = begin + walk.strip < walk.groups ? begin + walk.strip : walk.groups;
    group_ = begin + row_;
    end_ = channel_ < walk.channels ? end : group_;
    int64_t at;
    if constexpr (LAST) {
      at = group_ * walk.channels;
    } else {
      const int64_t image = group_ / walk.plane_groups;
      in_image_ = group_ - image * walk.plane_groups;
      at = image * (walk.channels * walk.plane) + in_image_ * V;
    }
    at_ = channel_ * walk.plane + (DIRECTION == Direction::kForward ? at : walk.last - at);
  }

  RF_DEVICE int64_t channel() const { return channel_; }
  RF_DEVICE int64_t split() const { return split_; }
  RF_DEVICE int row() const { return row_; }
  RF_DEVICE int rows() const { return rows_; }

  // Where the next groups are, up to UNROLL of them; how many there are, 0 at the end.
  template <int UNROLL>
  RF_DEVICE int next(int64_t (&at)[UNROLL]) {
    int count = 0;
    RF_UNROLL
    for (int u = 0; u < UNROLL; ++u) {
      if (group_ >= end_) break;
      at[u] = at_;
      ++count;
      group_ += rows_;
      int64_t step = walk_.step;
      if constexpr (!LAST) {
        in_image_ += walk_.step_groups;
        if (in_image_ >= walk_.plane_groups) {
          in_image_ -= walk_.plane_groups;
          step += walk_.carry;
        }
      }
      at_ += DIRECTION == Direction::kForward ? step : -step;
    }
    return count;
  }

 private:
  const Walk& walk_;
  int row_, rows_;
  int64_t split_, channel_, group_, end_, in_image_, at_;
};

// Mean and squared deviations of some values of CHANNELS channels; no values at first.
template <int CHANNELS>
struct Moments {
  static constexpr int kChannels = CHANNELS;
  static constexpr int kFloats = 2 * CHANNELS + 1;
  float at[kFloats] = {};  // means, sums of squared deviations, how many values each channel has

  RF_DEVICE float& count() { return at[2 * CHANNELS]; }
  RF_DEVICE float value(int j) const { return at[j]; }

  // Chan's formula.
  RF_DEVICE void merge(const Moments& other) {
    const float more = other.at[2 * CHANNELS];
    if (more == 0.0f) return;
    const float total = count() + more;
    const float share = more / total;
    const float weight = count() * share;
    RF_UNROLL
    for (int j = 0; j < CHANNELS; ++j) {
      const float delta = other.at[j] - at[j];
      at[j] = fused_multiply_add(delta, share, at[j]);
      at[CHANNELS + j] += fused_multiply_add(delta * delta, weight, other.at[CHANNELS + j]);
    }
    count() = total;
  }
};

// Sums of g and of g·(x − mean). A thread adds up few values; merged, the sums carry what rounding took from them.
template <int CHANNELS>
struct Sums {
  static constexpr int kChannels = CHANNELS;
  static constexpr int kFloats = 4 * CHANNELS;
  float at[kFloats] = {};  // both sums, and what is missing from each

  // Knuth's two-sum.
  RF_DEVICE void merge(const Sums& other) {
    RF_UNROLL
    for (int j = 0; j < 2 * CHANNELS; ++j) {
      const float sum = at[j] + other.at[j];
      const float added = sum - at[j];
      const float missing = (at[j] - (sum - added)) + (other.at[j] - added);
      at[2 * CHANNELS + j] += other.at[2 * CHANNELS + j] + missing;
      at[j] = sum;
    }
  }

  RF_DEVICE float value(int j) const {
    const float missing = at[2 * CHANNELS + j];
    return missing == missing ? at[j] + missing : at[j];  // infinite sums miss NaN
  }
};

// Merges what the rows of a block have, always in the same order; row 0 gets the result.
template <class S>
RF_DEVICE void combine(S& sum, int row, int rows) {
  RF_SHARED_ARRAY(float, slots, S::kFloats * kThreads);
  const int lanes = kThreads / rows;
  for (int half = rows / 2; half > 0; half /= 2) {
    if (row >= half && row < 2 * half) {
      RF_UNROLL
      for (int i = 0; i < S::kFloats; ++i) store_shared(slots + (i * kThreads + thread_x()) * 4, sum.at[i]);
    }
    barrier();
    if (row < half) {
      S other;
      const int from = thread_x() + half * lanes;
      RF_UNROLL
      for (int i = 0; i < S::kFloats; ++i) other.at[i] = load_shared<float>(slots + (i * kThreads + from) * 4);
      sum.merge(other);
    }
  }
}

// The block's sums, in row 0, to its part of the workspace.
template <class S, class W>
RF_DEVICE void store_partial(const Args& args, const S& sum, const W& walker) {
  if (walker.row() != 0 || walker.channel() >= args.walk.channels) return;
  RF_UNROLL
  for (int i = 0; i < 2; ++i) {
    float* to = args.partial + ((i * args.walk.splits + walker.split()) * args.walk.channels + walker.channel());
    RF_UNROLL
    for (int j = 0; j < S::kChannels; ++j) to[j] = sum.value(i * S::kChannels + j);
  }
}

// The sums of all splits, of one channel for each thread of row 0; the result stands there.
template <class S>
RF_DEVICE S merge_splits(const Args& args, int64_t channel) {
  static_assert(S::kChannels == 1);
  const Walk& walk = args.walk;
  const int row = thread_x() / kMergeLanes;
  S sum;
  const int splits = channel < walk.channels ? walk.splits : 0;
  for (int first = row; first < splits; first += kUnroll * kMergeRows) {
    S part[kUnroll];
    RF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t split = first + u * kMergeRows;
      if (split >= splits) break;
      RF_UNROLL
      for (int i = 0; i < 2; ++i) part[u].at[i] = args.partial[(i * walk.splits + split) * walk.channels + channel];
      if constexpr (std::is_same_v<S, Moments<1>>) {
        const int64_t rest = walk.groups - split * walk.strip;
        part[u].count() = static_cast<float>((rest < walk.strip ? rest : walk.strip) * walk.values);
      }
    }
    RF_UNROLL
    for (int u = 0; u < kUnroll; ++u) sum.merge(part[u]);
  }
  combine(sum, row, kMergeRows);
  return sum;
}

}  // namespace rf::norm
