// The products of one step, and what happens to finished sums.
#pragma once

#include "bottleneck/args.h"
#include "bottleneck/streams.cuh"
#include "bottleneck/tile.h"
#include "common/primitives.cuh"

namespace rf::bottleneck {

template <int TILES_M, int TILES_N>
using Sums = float[TILES_M][TILES_N][4];

// sums += a·bᵀ over 64 channels. a: where each lane's row begins, chunk lane/16 of row lane%16 of every 16-pixel tile;
// rows are aligned to their size, so that the other chunks are an exclusive or away. b: this warp's rows of a chunk of
// weights. Of the channels from 32·g on, row 8·(c/2) + 2·t + c%2 becomes column c of
// n8 tile 4·g + t, so that sums[i][4·g + t][2·half + u] is pixel 16·i + lane/4 + 8·half, channel
// 32·g + 8·(lane%4) + 2·t + u.
template <class T, int TILES_M, int TILES_N>
RF_DEVICE void multiply(Sums<TILES_M, TILES_N>& sums, const SharedAddress (&a)[TILES_M], SharedAddress b) {
  const int lane = thread_x() % 32;
  const SharedAddress b_row = b + chunk_at(lane % 8 / 2 * 8 + lane % 2 + lane / 16 * 2, lane / 8 % 2, lane % 8);
  RF_UNROLL_TWICE  // unrolled further, the loads run so far ahead that registers spill
  for (int pair = 0; pair < kDepth / 16; ++pair) {
    uint32_t left[TILES_M][4];
    RF_UNROLL
    for (int i = 0; i < TILES_M; ++i) load_matrix<4>(left[i], a[i] ^ (pair << 5));
    RF_UNROLL
    for (int j = 0; j < TILES_N / 2; ++j) {
      uint32_t right[4];
      load_matrix<4>(right, (b_row ^ (pair << 5)) + (j / 2 * 32 + j % 2 * 4) * kRowBytes);
      RF_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t column[2] = {right[half * 2], right[half * 2 + 1]};
        RF_UNROLL
        for (int i = 0; i < TILES_M; ++i) mma<T>(sums[i][j * 2 + half], left[i], column);
      }
    }
  }
}

// Where the batch norm of a channel lies in its table. A quarter of a warp reads four times eight channels, 16 bytes at a
// time: the second sixteen have their 16-byte pairs swapped, so that they find other banks than the first.
RF_DEVICE int table_at(int channel) { return channel * 8 ^ (channel >> 4 & 1) << 4; }

// Writes batch norm as (scale, shift) for each channel.
template <class T>
RF_DEVICE void fill_table(SharedAddress table, const Conv& conv, int channels) {
  for (int k = thread_x(); k < channels; k += kThreads) {
    const float gamma = conv.gamma ? channel_value<T>(conv.gamma, conv.wide & kWideGamma, k) : 1.0f;
    const float beta = conv.beta ? channel_value<T>(conv.beta, conv.wide & kWideBeta, k) : 0.0f;
    const float bias = conv.bias ? channel_value<T>(conv.bias, conv.wide & kWideBias, k) : 0.0f;
    const float mean = channel_value<T>(conv.mean, conv.wide & kWideMean, k);
    const float scale = reciprocal_sqrt(channel_value<T>(conv.var, conv.wide & kWideVar, k) + conv.eps) * gamma;
    store_shared(table + table_at(k), Vector<float, 2>{{scale, fused_multiply_add(bias - mean, scale, beta)}});
  }
}

// Batch norm of eight neighbouring channels.
struct Affine {
  Vector<float, 4> pairs[4];  // scale, shift, scale, shift

  RF_DEVICE explicit Affine(SharedAddress table, int channel) {
    const SharedAddress from = table + channel * 8;
    const int swapped = (thread_x() >> 1 & 1) << 4;  // table_at: a lane's channels begin at 8·(lane%4) of 32
    RF_UNROLL
    for (int i = 0; i < 4; ++i) {
      pairs[i] = load_shared<Vector<float, 4>>((i % 2 == 0 ? from + swapped : from - swapped) + i * 16);
    }
  }
  RF_DEVICE float apply(float sum, int i) const {
    return fused_multiply_add(sum, pairs[i / 2].at[i % 2 * 2], pairs[i / 2].at[i % 2 * 2 + 1]);
  }
};

RF_DEVICE float relu(float v) { return v < 0.0f ? 0.0f : v; }  // keeps NaN

}  // namespace rf::bottleneck
