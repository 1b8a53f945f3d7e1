// One batch_norm_act problem, or one of its gradient, as plain data: what the host plans on and the kernels read.
#pragma once

#include <cstdint>

namespace rf::norm {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;       // groups that a thread has under way
constexpr int kMergeLanes = 8;   // channels of a block that merges; the other threads share out the splits
constexpr int kMergeRows = kThreads / kMergeLanes;

// Blocks that a multiprocessor holds at once: with vectors a thread has up to 106 registers, else 63.
constexpr int blocks_at_once(bool vectors) { return vectors ? 2 : 4; }

// Bits of Args::wide: which of the per-channel vectors are float32 whatever the element type.
enum Wide : unsigned {
  kWideGamma = 1,
  kWideBeta = 2,
  kWideMean = 4,
  kWideScale = 8,
  kWideRunningMean = 16,
  kWideRunningVar = 32,
};

// How blocks and threads walk a dense tensor. A group is what one access brings: V neighbouring channels of one pixel in
// channels_last, V neighbouring pixels of one channel in NCHW. A block takes a chunk of channels, and of their groups one
// split; each row of its threads takes every so many-th group. Distances are in elements.
struct Walk {
  int64_t channels;
  int64_t plane;        // from a channel to the next: 1 in channels_last
  int64_t groups;       // of each channel, or of V channels in channels_last
  int64_t strip;        // groups of a split, the last one's apart
  int64_t plane_groups; // of one image
  int64_t step;         // from a thread's group to its next, in the same image
  int64_t step_groups;  // the same in groups of that image
  int64_t carry;        // added where the next image begins
  int64_t last;         // from the first group to the last
  int chunks, splits;
  int lanes_log2;       // threads beside one another on channels; 2^lanes_log2 · rows = kThreads
  int values;           // of one channel in a group
};

// y = act((x − mean) · r · gamma + beta + residual) with r = 1/√(var + eps) of all pixels, or of given statistics.
struct Args {
  Walk walk;
  const void* x;
  const void* residual;  // may be null, and so may gamma, beta, output, and what a call does not want written
  const void* grad;      // of y
  const void* output;    // y where ReLU was applied: it decides where the gradient passes
  void* out;             // y
  void* dx;
  void* dresidual;

  const void* gamma;
  const void* beta;
  const void* mean;     // as used: of the batch, else given
  const void* scale;    // r of the batch; else the variance that is given
  void* running_mean;   // follow by `momentum`, or by 1/batches where that is not null
  void* running_var;
  const int64_t* batches;
  float* batch_mean;    // written by the forward pass: mean and r, which it then uses
  float* batch_scale;
  float* dgamma;        // written by the backward pass
  float* dbeta;
  float* partial;       // [2, splits, channels]

  float eps, momentum;
  unsigned wide;
  bool training;  // the batch's own statistics
  bool relu;
};

}  // namespace rf::norm
