// What flows from global into shared memory while the block multiplies: weights and x, in chunks of 64 channels.
#pragma once

#include "bottleneck/args.h"
#include "bottleneck/tile.h"
#include "common/primitives.cuh"

namespace rf::bottleneck {

// 16-byte chunks are permuted within a row by a key, so that the eight rows that ldmatrix reads at once lie in
// different banks.
RF_DEVICE SharedAddress chunk_at(int row, int chunk, int key) { return row * kRowBytes + ((chunk ^ key) << 4); }

// The tensor core gives a lane two neighbouring columns of each n8 tile. Weights enter the four tiles of 32 channels in
// such an order that these are eight neighbouring channels: see multiply(). The eight rows of one tile have this key.
RF_DEVICE int weight_key(int row) { return (row >> 3 & 3) * 2 + (row & 1); }

// Where a tile lies.
template <class Tile>
struct Place {
  int n, p0, q0;  // its image and its first output pixel

  RF_DEVICE Place(const Args& args, int tile) {
    const int row = tile / args.tiles_w;
    q0 = (tile - row * args.tiles_w) * Tile::TILE_W;
    n = row / args.tiles_h;
    p0 = (row - n * args.tiles_h) * Tile::TILE_H;
  }
};

template <class T, class Tile>
class WeightStream {
 public:
  RF_DEVICE WeightStream(const Args& args, SharedAddress ring, int tile) : args_(args), ring_(ring), tile_(tile) {}

  // Starts the copy of the chunk for the next step of this block's tiles, if there is one.
  RF_DEVICE void next() {
    if (tile_ >= args_.tiles) return;
    const SharedAddress slot = ring_ + slot_ * Tile::kChunkBytes;
    slot_ = slot_ + 1 == Tile::W_SLOTS ? 0 : slot_ + 1;
    constexpr int kStart2 = Tile::kSteps1, kStart3 = kStart2 + Tile::kSteps2;
    if (step_ < kStart2) {
      copy(slot, args_.conv1.weight, Tile::CIN, step_ % Tile::kSlicesX * kDepth);
    } else if (step_ < kStart3) {
      copy(slot, args_.conv2.weight, 9 * Tile::MID, (step_ - kStart2) * kDepth);
    } else {
      const int part = (step_ - kStart3) / Tile::kStepsOfPart;
      const int slice = (step_ - kStart3) - part * Tile::kStepsOfPart;
      if (!Tile::PROJECT || slice < Tile::kSlices) {
        copy(slot, args_.conv3.weight, Tile::MID, part * Tile::MID * Tile::MID + slice * kDepth);
      } else {
        copy(slot, args_.shortcut.weight, Tile::CIN, part * Tile::MID * Tile::CIN + (slice - Tile::kSlices) * kDepth);
      }
    }
    if (++step_ == Tile::kSteps) {
      step_ = 0;
      tile_ += grid_x();
    }
  }

 private:
  RF_DEVICE static void copy(SharedAddress slot, const void* weight, int pitch, int offset) {
    const int chunk = thread_x() % 8;
    const T* from = static_cast<const T*>(weight) + (offset + chunk * 8);
    RF_ROLLED
    for (int i = 0; i < Tile::MID; i += kThreads / 8) {
      const int row = i + thread_x() / 8;
      async_copy<16>(slot + chunk_at(row, chunk, weight_key(row)), from + row * pitch, true);
    }
  }

  const Args& args_;
  SharedAddress ring_;
  int tile_;
  int slot_ = 0, step_ = 0;
};

template <class T, class Tile>
class InputStream {
 public:
  RF_DEVICE InputStream(const Args& args, SharedAddress ring, int tile) : args_(args), ring_(ring), tile_(tile) {}

  // Starts the copy of the next 64 channels of a pass over the halo; pixels outside of the image become zeros.
  RF_DEVICE void next() {
    if (tile_ >= args_.tiles) return;
    const SharedAddress slot = ring_ + slot_ * Tile::kXBytes;
    slot_ = slot_ + 1 == Tile::X_SLOTS ? 0 : slot_ + 1;
    const int pass = step_ / Tile::kSlicesX;
    const int channel = (step_ - pass * Tile::kSlicesX) * kDepth + thread_x() % 8 * 8;
    const Place<Tile> place(args_, tile_);
    const T* image = static_cast<const T*>(args_.x) + place.n * args_.x_stride_n;
    RF_ROLLED
    for (int row = thread_x() / 8; row < Tile::kSlotRows; row += kThreads / 8) {
      const int pixel = pass * Tile::kSlotRows + row;
      if (Tile::kPasses > 1 && pixel >= Tile::kHalo) break;
      const int h = place.p0 * Tile::STRIDE - 1 + pixel / Tile::kHaloW;
      const int w = place.q0 * Tile::STRIDE - 1 + pixel % Tile::kHaloW;
      const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(args_.h) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(args_.w);
      const int64_t from = h * args_.x_stride_h + w * args_.x_stride_w + channel;
      async_copy<16>(slot + chunk_at(row, thread_x() % 8, row & 7), image + (inside ? from : 0), inside);
    }
    if (++step_ == Tile::kSteps1) {
      step_ = 0;
      tile_ += grid_x();
    }
  }

  // Starts the copy of x under the output pixels of the tile at `place`, all channels.
  RF_DEVICE void centre(SharedAddress to, const Place<Tile>& place) const {
    const T* image = static_cast<const T*>(args_.x) + place.n * args_.x_stride_n;
    RF_ROLLED
    for (int i = thread_x(); i < Tile::kPixels * Tile::kSlicesX * 8; i += kThreads) {
      const int chunk = i % 8, slice = i / 8 % Tile::kSlicesX, pixel = i / 8 / Tile::kSlicesX;
      const int p = place.p0 + pixel / Tile::TILE_W, q = place.q0 + pixel % Tile::TILE_W;
      const bool inside = p < args_.p && q < args_.q;
      const int64_t from = p * Tile::STRIDE * args_.x_stride_h + q * Tile::STRIDE * args_.x_stride_w +
                           (slice * kDepth + chunk * 8);
      async_copy<16>(to + slice * Tile::kCentreSlice + chunk_at(pixel, chunk, pixel & 7), image + (inside ? from : 0),
                     inside);
    }
  }

 private:
  const Args& args_;
  SharedAddress ring_;
  int tile_;
  int slot_ = 0, step_ = 0;
};

}  // namespace rf::bottleneck
