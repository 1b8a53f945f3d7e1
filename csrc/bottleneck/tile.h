// The geometry of a kernel: its tile, its steps and its map of shared memory, as constants for host and device.
#pragma once

#include <cstdint>

namespace rf::bottleneck {

constexpr int kRowBytes = 128;  // a row of 64 channels: the depth of one step, eight 16-byte chunks
constexpr int kDepth = 64;
constexpr int kWarpsM = 4, kWarpsN = 2;  // the block's warps over pixels and output channels
constexpr int kThreads = kWarpsM * kWarpsN * 32;

// MID, CIN       channels of the hidden tensors and of x; the output has 4·MID
// STRIDE         of the 3x3 convolution and of the projection
// PROJECT        the shortcut is a 1x1 convolution of x, else x itself
// TILE_H, TILE_W output pixels of a tile
// HALO_TILES     16-pixel tiles of the first convolution that one warp sums at a time
// W_SLOTS        chunks of weights in the ring; 0: all stay
// X_SLOTS        chunks of x in the ring
// BLOCKS         to a multiprocessor, where its shared memory holds so many
template <int MID_, int CIN_, int STRIDE_, bool PROJECT_, int TILE_H_, int TILE_W_, int HALO_TILES_, int W_SLOTS_,
          int X_SLOTS_, int BLOCKS_>
struct Tile {
  static constexpr int MID = MID_, CIN = CIN_, COUT = 4 * MID_, STRIDE = STRIDE_;
  static constexpr bool PROJECT = PROJECT_, RESIDENT = W_SLOTS_ == 0;
  static constexpr int TILE_H = TILE_H_, TILE_W = TILE_W_, BLOCKS = BLOCKS_;
  static_assert(MID % kDepth == 0 && CIN % kDepth == 0 && (PROJECT || (CIN == COUT && STRIDE == 1)));

  static constexpr int fragments(int rows) {  // bytes that the warps read in one step, each its share of both operands
    return kWarpsM * kWarpsN * (rows / kWarpsM + MID / kWarpsN) * kRowBytes;
  }

  // The tile, and the pixels of the first convolution under it: a border of one pixel for the 3x3 window.
  static constexpr int kPixels = TILE_H * TILE_W;
  static constexpr int kHaloH = (TILE_H - 1) * STRIDE + 3, kHaloW = (TILE_W - 1) * STRIDE + 3;
  static constexpr int kHalo = kHaloH * kHaloW;

  // A warp's share in m16n8 tiles: of the output pixels, of the halo, of a chunk's output channels.
  static constexpr int kTilesM = (kPixels + 16 * kWarpsM - 1) / (16 * kWarpsM);
  static constexpr int kHaloTiles = HALO_TILES_;
  static constexpr int kTilesN = MID / kWarpsN / 8;
  static constexpr int kRows = 16 * kWarpsM * kTilesM;

  // The first convolution takes the halo in equal passes that its registers can hold.
  static constexpr int kPassRows = 16 * kWarpsM * kHaloTiles;
  static constexpr int kPasses = (kHalo + kPassRows - 1) / kPassRows;
  static constexpr int kSlotRows = (kHalo + kPasses - 1) / kPasses;  // pixels of a pass

  // A step multiplies rows of 64 channels with one chunk of weights, [MID output channels, 64].
  static constexpr int kSlices = MID / kDepth, kSlicesX = CIN / kDepth;  // of a hidden pixel and of a pixel of x
  static constexpr int kSteps1 = kPasses * kSlicesX;
  static constexpr int kSteps2 = 9 * kSlices;
  static constexpr int kStepsOfPart = kSlices + (PROJECT ? kSlicesX : 0);  // for MID of the COUT output channels
  static constexpr int kParts = COUT / MID;
  static constexpr int kSteps = kSteps1 + kSteps2 + kParts * kStepsOfPart;

  static constexpr int W_SLOTS = RESIDENT ? kSteps : W_SLOTS_, X_SLOTS = X_SLOTS_;
  static_assert(W_SLOTS >= 2 && (!RESIDENT || kPasses == 1));
  static_assert(X_SLOTS <= kSteps1 && (X_SLOTS >= 2 || kSteps1 == 1), "a chunk of x would arrive too late");
  // Groups of copies that may still be under way when a step starts; x is refilled X_SLOTS - 1 steps ahead.
  static constexpr int kPending = RESIDENT ? X_SLOTS : W_SLOTS - 2;
  static constexpr int kPending1 = RESIDENT ? 0 : kSteps1 == 1 || X_SLOTS > W_SLOTS ? W_SLOTS - 2 : X_SLOTS - 2;

  // Shared memory, in bytes.
  static constexpr int kChunkBytes = MID * kRowBytes;
  static constexpr int kXBytes = kSlotRows * kRowBytes;
  static constexpr int kHiddenSlice = kHalo * kRowBytes;  // 64 channels of every halo pixel
  static constexpr int kCentreSlice = kPixels * kRowBytes;
  static_assert(kRows <= kHalo, "the second hidden tensor takes the first one's place");

  static constexpr int kTable = 0;  // (scale, shift) of every channel's batch norm
  static constexpr int kTable2 = kTable + MID * 8, kTable3 = kTable2 + MID * 8, kTableShortcut = kTable3 + COUT * 8;
  static constexpr int kWeights = kTableShortcut + (PROJECT ? COUT * 8 : 0);
  static constexpr int kX = kWeights + W_SLOTS * kChunkBytes;
  static constexpr int kHidden = kX + X_SLOTS * kXBytes;
  static constexpr int kCentre = kHidden + kSlices * kHiddenSlice;  // x under the output pixels, for the projection
  static constexpr int kSharedBytes = kCentre + (PROJECT ? kSlicesX * kCentreSlice : 0);

  // What a tile costs: multiply-adds, with the rows that pad it; bytes of weights; bytes that warps read of shared
  // memory for the products, that go in and out besides, without the weights; bytes of x and out through L2.
  static constexpr int64_t kProducts = int64_t{kPasses * kPassRows} * CIN * MID +
                                       int64_t{kRows} * (9 * MID * MID + MID * COUT + (PROJECT ? CIN * COUT : 0));
  static constexpr int64_t kWeightBytes = int64_t{kSteps} * kChunkBytes;
  static constexpr int64_t kFragments = int64_t{kSteps1} * fragments(kPassRows) +
                                        int64_t{kSteps - kSteps1} * fragments(kRows);
  static constexpr int64_t kLanded = (kHalo + (PROJECT ? kPixels : 0)) * CIN * 2 + (kHalo + kRows) * MID * 2;
  static constexpr int64_t kMoved = (kHalo + kPixels) * CIN * 2 + kPixels * COUT * 2;
};

}  // namespace rf::bottleneck
