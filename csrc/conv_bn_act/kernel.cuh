// conv_bn_act as an implicit GEMM: [pixels, r·s·c] × [r·s·c, k], the first matrix gathered from x as it is read.
#pragma once

#include "common/primitives.cuh"
#include "conv_bn_act/args.h"
#include "conv_bn_act/epilogue.cuh"
#include "conv_bn_act/loader.cuh"
#include "conv_bn_act/math.cuh"

namespace rf::conv {

// One row of the list in instances.h as a type.
template <class T_, template <class, int, int, int, int, int> class Math_, int BM_, int BN_, int ROW_BYTES_, int GRID_M,
          int GRID_N, int STAGES_, int COPY, int BLOCKS_>
struct Tile {
  using T = T_;
  using Math = Math_<T, BM_, BN_, ROW_BYTES_, GRID_M, GRID_N>;
  static constexpr int BM = BM_, BN = BN_, STAGES = STAGES_, ROW_BYTES = ROW_BYTES_;
  static constexpr int THREADS = Math::kThreads, BLOCKS = BLOCKS_;
  using Loader = conv::Loader<T, BM, BN, ROW_BYTES, THREADS, COPY>;
  static constexpr int PIPELINE_BYTES = STAGES * Loader::kStageBytes;
  static constexpr int SLICE_BYTES = Math::kSliceRows * Math::kSlicePitch * 4;
  static constexpr int SHARED_BYTES = PIPELINE_BYTES > SLICE_BYTES ? PIPELINE_BYTES : SLICE_BYTES;
};

template <class Tile>
RF_KERNEL(Tile::THREADS, Tile::BLOCKS)
conv_kernel(RF_CONSTANT Args args) {
  using T = typename Tile::T;
  using Math = typename Tile::Math;
  constexpr int STAGES = Tile::STAGES, BN = Tile::BN;
  constexpr int kStageBytes = Tile::Loader::kStageBytes;
  const SharedAddress shared = dynamic_shared();

  const int tile_m = block_x() / args.tiles_n;
  const int n0 = (block_x() - tile_m * args.tiles_n) * BN;
  const int64_t m0 = static_cast<int64_t>(tile_m) * Tile::BM;
  const int group = block_z() / args.splits;
  const int split = block_z() - group * args.splits;

  constexpr int kStep = Tile::ROW_BYTES / static_cast<int>(sizeof(T));
  const int all_steps = (args.r * args.s * (args.c / args.groups) + kStep - 1) / kStep;
  const int first_step = split * args.steps_per_split;
  const int rest = all_steps - first_step;
  const int steps = rest < args.steps_per_split ? rest : args.steps_per_split;

  typename Tile::Loader loader(args, m0, n0, group, first_step);
  RF_UNROLL
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < steps) loader.load(shared + i * kStageBytes);
    async_commit();
  }
  Math math;
  for (int step = 0; step < steps; ++step) {
    async_wait<STAGES - 2>();
    barrier();  // the stage is complete, and nobody still reads the one that is filled next
    const int next = step + STAGES - 1;
    if (next < steps) loader.load(shared + next % STAGES * kStageBytes);
    async_commit();
    math.step(shared + step % STAGES * kStageBytes);
  }
  async_wait<0>();
  barrier();

  constexpr int V = 16 / static_cast<int>(sizeof(T));
  constexpr int kChunks = BN / V;
  constexpr int kRowsAtOnce = Tile::THREADS / kChunks;
  static_assert(Tile::THREADS % kChunks == 0 && Math::kSliceRows % kRowsAtOnce == 0);
  const int64_t rows = args.n * args.p * args.q;
  const int channels_out = args.k / args.groups;
  const int column = thread_x() % kChunks * V;
  const int left = channels_out - n0 - column;
  const int count = left < V ? left : V;
  const int channel = group * channels_out + n0 + column;
  ChannelAffine<T, V> affine{};
  if (args.splits == 1) affine.load(args, channel, count);
  RF_UNROLL
  for (int slice = 0; slice < Math::kSlices; ++slice) {
    math.store_slice(slice, shared);
    barrier();
    for (int row = thread_x() / kChunks; row < Math::kSliceRows; row += kRowsAtOnce) {
      const int64_t m = m0 + Math::tile_row(slice, row);
      if (m >= rows || count <= 0) continue;
      float sum[V];
      RF_UNROLL
      for (int i = 0; i < V; i += 4) {
        const int at = slice_offset<Math::kSlicePitch>(row, column + i);
        const auto part = load_shared<Vector<float, 4>>(shared + at);
        RF_UNROLL
        for (int j = 0; j < 4; ++j) sum[i + j] = part.at[j];
      }
      if (args.splits == 1) {
        finish<T, V>(args, affine, sum, m, channel, count);
      } else {
        store_partial<V>(args, sum, split, m, channel, count);
      }
    }
    barrier();
  }
}

}  // namespace rf::conv
