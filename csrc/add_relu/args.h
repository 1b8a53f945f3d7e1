// Element-wise problems of two inputs and one output as plain data.
#pragma once

#include <cstdint>

namespace rf::add_relu {

constexpr int kMaxDims = 5;
constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // accesses of each thread, all issued before the first is used

// `count` neighbouring elements of three dense buffers. The first `head` elements bring the pointers to 16 bytes.
struct FlatArgs {
  const void* a;
  const void* b;
  void* out;
  int64_t count;
  int head;
};

// Outermost dimension first; strides in elements. Unused dimensions lead, with size 1.
struct StridedArgs {
  const void* a;
  const void* b;
  void* out;
  int64_t count;
  int64_t size[kMaxDims];
  int64_t stride_a[kMaxDims], stride_b[kMaxDims], stride_out[kMaxDims];
};

}  // namespace rf::add_relu
