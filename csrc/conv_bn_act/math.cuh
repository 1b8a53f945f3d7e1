// How a block turns a stage into sums: on tensor cores, or in IEEE float32 on the CUDA cores.
//
// Both hold their share of the tile's sums in registers and hand them out in kSlices slices of kSliceRows rows:
// store_slice writes slice i to shared memory, tile_row says which row of the tile a slice's row is.
#pragma once

#include "common/primitives.cuh"
#include "conv_bn_act/loader.cuh"

namespace rf::conv {

// Where a float of a slice lies, in bytes. The pitch keeps the stores of sums free of bank conflicts. The loads, 16 bytes
// to each of eight lanes at a time, lie 32 bytes apart for half types: every other 32 columns (with tiles of 32, every
// other row) has its 16-byte chunks swapped in pairs, so that the second four lanes find other banks than the first.
template <int PITCH>
RF_DEVICE int slice_offset(int row, int column) {
  return (row * PITCH + (column ^ ((row + (column >> 5)) & 1) * 4)) * 4;
}

// GRID_M × GRID_N warps, each with a BM/GRID_M × BN/GRID_N part of the tile, in m16n8 fragments.
template <class T, int BM, int BN, int ROW_BYTES, int GRID_M, int GRID_N>
class TensorCore {
  static constexpr int kWarpM = BM / GRID_M, kWarpN = BN / GRID_N;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);

 public:
  static constexpr int kThreads = GRID_M * GRID_N * 32;
  static constexpr int kSlices = kTilesM;
  static constexpr int kSliceRows = GRID_M * 16, kSlicePitch = BN + 8;

  RF_DEVICE static int tile_row(int slice, int row) { return row / 16 * kWarpM + slice * 16 + row % 16; }

  RF_DEVICE void step(SharedAddress stage) {
    const int lane = thread_x() % 32;
    const int row_a = warp_m() * kWarpM + lane % 16;
    const int row_b = BM + warp_n() * kWarpN + lane % 8 + lane / 16 * 8;
    RF_UNROLL
    for (int pair = 0; pair < ROW_BYTES / 32; ++pair) {
      uint32_t b[kTilesN / 2][4];
      RF_UNROLL
      for (int j = 0; j < kTilesN / 2; ++j) {
        load_matrix<4>(b[j], stage + chunk_offset<ROW_BYTES>(row_b + j * 16, pair * 2 + lane / 8 % 2));
        if constexpr (sizeof(T) == 4) round_all(b[j]);
      }
      RF_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        uint32_t a[4];
        load_matrix<4>(a, stage + chunk_offset<ROW_BYTES>(row_a + i * 16, pair * 2 + lane / 16));
        if constexpr (sizeof(T) == 4) round_all(a);
        RF_UNROLL
        for (int j = 0; j < kTilesN; ++j) {
          const uint32_t fragment_b[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma<T>(sum_[i][j], a, fragment_b);
        }
      }
    }
  }

  RF_DEVICE void store_slice(int slice, SharedAddress to) const {
    const int lane = thread_x() % 32;
    const int row = warp_m() * 16 + lane / 4;
    const int column = warp_n() * kWarpN + lane % 4 * 2;
    RF_UNROLL
    for (int j = 0; j < kTilesN; ++j) {
      RF_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int at = slice_offset<kSlicePitch>(row + half * 8, column + j * 8);
        store_shared(to + at, Vector<float, 2>{{sum_[slice][j][half * 2], sum_[slice][j][half * 2 + 1]}});
      }
    }
  }

 private:
  RF_DEVICE static int warp_m() { return thread_x() / 32 % GRID_M; }
  RF_DEVICE static int warp_n() { return thread_x() / 32 / GRID_M; }

  RF_DEVICE static void round_all(uint32_t (&fragment)[4]) {
    RF_UNROLL
    for (int j = 0; j < 4; ++j) fragment[j] = tf32_bits(fragment[j]);
  }

  float sum_[kTilesM][kTilesN][4] = {};
};

// GRID_M × GRID_N threads, each with every GRID_M-th row and every GRID_N-th column of the tile.
template <class T, int BM, int BN, int ROW_BYTES, int GRID_M, int GRID_N>
class Ieee {
  static_assert(sizeof(T) == 4);
  static constexpr int kRows = BM / GRID_M, kColumns = BN / GRID_N;

 public:
  static constexpr int kThreads = GRID_M * GRID_N;
  static constexpr int kSlices = kRows;
  static constexpr int kSliceRows = GRID_M, kSlicePitch = BN + GRID_N;

  RF_DEVICE static int tile_row(int slice, int row) { return slice * GRID_M + row; }

  RF_DEVICE void step(SharedAddress stage) {
    RF_UNROLL
    for (int chunk = 0; chunk < ROW_BYTES / 16; ++chunk) {
      Vector<float, 4> a[kRows];
      RF_UNROLL
      for (int i = 0; i < kRows; ++i) {
        a[i] = load_shared<Vector<float, 4>>(stage + chunk_offset<ROW_BYTES>(i * GRID_M + thread_m(), chunk));
      }
      RF_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const auto b =
            load_shared<Vector<float, 4>>(stage + chunk_offset<ROW_BYTES>(BM + j * GRID_N + thread_n(), chunk));
        RF_UNROLL
        for (int e = 0; e < 4; ++e) {
          RF_UNROLL
          for (int i = 0; i < kRows; ++i) sum_[i][j] = fused_multiply_add(a[i].at[e], b.at[e], sum_[i][j]);
        }
      }
    }
  }

  RF_DEVICE void store_slice(int slice, SharedAddress to) const {
    RF_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      store_shared(to + slice_offset<kSlicePitch>(thread_m(), j * GRID_N + thread_n()), sum_[slice][j]);
    }
  }

 private:
  RF_DEVICE static int thread_m() { return thread_x() / GRID_N; }
  RF_DEVICE static int thread_n() { return thread_x() % GRID_N; }

  float sum_[kRows][kColumns] = {};
};

}  // namespace rf::conv
