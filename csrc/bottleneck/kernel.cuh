// A whole bottleneck in one launch: each block takes tiles of output pixels from x to out with nothing in between in
// global memory. README.md beside this file explains it.
#pragma once

#include "bottleneck/args.h"
#include "bottleneck/math.cuh"
#include "bottleneck/streams.cuh"
#include "bottleneck/tile.h"
#include "common/primitives.cuh"

namespace rf::bottleneck {

template <class T, class Tile>
class Block {
  static constexpr int kSpan = Tile::MID / kWarpsN;  // a warp's output channels of a chunk of weights
  static constexpr int kGroups = kSpan / 32;
  using Eight = Vector<T, 8>;

 public:
  RF_DEVICE explicit Block(const Args& args)
      : args_(args),
        shared_(dynamic_shared()),
        weights_(args, shared_ + Tile::kWeights, block_x()),
        input_(args, shared_ + Tile::kX, block_x()) {}

  RF_DEVICE void run() {
    for (int i = 0; i < Tile::X_SLOTS; ++i) input_.next();
    constexpr int kAhead = Tile::RESIDENT ? Tile::W_SLOTS : Tile::W_SLOTS - 1;
    for (int i = 0; i < kAhead; ++i) {
      weights_.next();
      async_commit();
    }
    fill_table<T>(shared_ + Tile::kTable, args_.conv1, Tile::MID);
    fill_table<T>(shared_ + Tile::kTable2, args_.conv2, Tile::MID);
    fill_table<T>(shared_ + Tile::kTable3, args_.conv3, Tile::COUT);
    if constexpr (Tile::PROJECT) fill_table<T>(shared_ + Tile::kTableShortcut, args_.shortcut, Tile::COUT);
    for (int tile = block_x(); tile < args_.tiles; tile += grid_x()) {
      const Place<Tile> place(args_, tile);
      reduce(place);
      convolve(place);
      expand(place);
    }
  }

 private:
  // conv1, batch norm and ReLU on the halo, into the hidden tensor: the 1x1 that reduces the channels.
  RF_DEVICE void reduce(const Place<Tile>& place) {
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      const int first = pass * Tile::kSlotRows;
      const int last = Tile::kHalo - first < Tile::kSlotRows ? Tile::kHalo - first - 1 : Tile::kSlotRows - 1;
      SharedAddress offset[Tile::kHaloTiles];
      RF_UNROLL
      for (int i = 0; i < Tile::kHaloTiles; ++i) {
        const int own = halo_row(i) + lane() % 16;
        const int inside = own < last ? own : last;  // rows past the halo: any will do, they are not stored
        offset[i] = chunk_at(inside, lane() / 16, lane() & 7);
      }
      Sums<Tile::kHaloTiles, Tile::kTilesN> sums = {};
      RF_ROLLED
      for (int slice = 0; slice < Tile::kSlicesX; ++slice) {
        arrive<Tile::kPending1>();
        if (pass + slice > 0) input_.next();
        send();
        SharedAddress a[Tile::kHaloTiles];
        RF_UNROLL
        for (int i = 0; i < Tile::kHaloTiles; ++i) a[i] = shared_ + Tile::kX + x_slot_ * Tile::kXBytes + offset[i];
        multiply<T>(sums, a, weights());
        x_slot_ = x_slot_ + 1 == Tile::X_SLOTS ? 0 : x_slot_ + 1;
      }
      each_eight<Tile::kHaloTiles>(shared_ + Tile::kTable, 0, [&](int i, int half, int group, const Affine& affine) {
        const int own = halo_row(i) + lane() / 4 + half * 8;
        if (own > last) return;
        const int pixel = first + own;
        const int down = pixel / Tile::kHaloW, right = pixel % Tile::kHaloW;
        const int h = place.p0 * Tile::STRIDE - 1 + down, w = place.q0 * Tile::STRIDE - 1 + right;
        const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(args_.h) &&
                            static_cast<unsigned>(w) < static_cast<unsigned>(args_.w);
        Eight result{};  // the 3x3 convolution pads with zeros
        if (inside) result = rectified(sums, affine, i, group, half);
        store_shared(hidden(channel(group), pixel, halo_key(halo_index(down, right), right)), result);
      });
    }
  }

  // conv2, batch norm and ReLU, from the hidden tensor into itself.
  RF_DEVICE void convolve(const Place<Tile>& place) {
    SharedAddress corner[Tile::kTilesM];  // the halo pixel under the filter's first tap
    RF_UNROLL
    for (int i = 0; i < Tile::kTilesM; ++i) {
      const int own = row(i) + lane() % 16;
      const int pixel = own < Tile::kPixels ? own : Tile::kPixels - 1;
      const int at = (pixel / Tile::TILE_W * Tile::kHaloW + pixel % Tile::TILE_W) * Tile::STRIDE;
      corner[i] = shared_ + Tile::kHidden + at * kRowBytes;
    }
    Sums<Tile::kTilesM, Tile::kTilesN> sums = {};
    RF_ROLLED
    for (int tap = 0; tap < 9; ++tap) {
      RF_UNROLL
      for (int slice = 0; slice < Tile::kSlices; ++slice) {
        if (tap + slice == 0) {
          arrive<Tile::kPending>();
          input_.next();
          if constexpr (Tile::PROJECT) input_.centre(shared_ + Tile::kCentre, place);
          send();
        } else {
          next_weights();
        }
        const int down = tap / 3, right = tap - down * 3;
        const int key = halo_key(lane() + halo_index(down, right), right);
        const SharedAddress shift =
            slice * Tile::kHiddenSlice + chunk_at(down * Tile::kHaloW + right, lane() / 16, key);
        SharedAddress a[Tile::kTilesM];
        RF_UNROLL
        for (int i = 0; i < Tile::kTilesM; ++i) a[i] = corner[i] + shift;
        multiply<T>(sums, a, weights());
      }
    }
    barrier();  // everybody has read the first hidden tensor
    each_eight<Tile::kTilesM>(shared_ + Tile::kTable2, 0, [&](int i, int half, int group, const Affine& affine) {
      const int pixel = row(i) + lane() / 4 + half * 8;
      store_shared(hidden(channel(group), pixel, turned(pixel)), rectified(sums, affine, i, group, half));
    });
    if constexpr (Tile::RESIDENT) {
      if constexpr (Tile::PROJECT) async_wait<0>();  // x under the output pixels
      barrier();
    }
  }

  // conv3 and its batch norm, the shortcut, ReLU, and the result: the 1x1 that expands the channels, MID at a time.
  RF_DEVICE void expand(const Place<Tile>& place) {
    SharedAddress hidden_row[Tile::kTilesM], centre_row[Tile::kTilesM];
    RF_UNROLL
    for (int i = 0; i < Tile::kTilesM; ++i) {
      const int own = row(i) + lane() % 16;
      const int pixel = own < Tile::kPixels ? own : Tile::kPixels - 1;
      hidden_row[i] = shared_ + Tile::kHidden + chunk_at(own, lane() / 16, turned(lane()));
      centre_row[i] = shared_ + Tile::kCentre + chunk_at(pixel, lane() / 16, lane() & 7);
    }
    RF_ROLLED
    for (int part = 0; part < Tile::kParts; ++part) {
      Eight residual[Tile::kTilesM][2][kGroups] = {};
      if constexpr (!Tile::PROJECT) {  // under the products
        RF_UNROLL
        for (int i = 0; i < Tile::kTilesM; ++i) {
          RF_UNROLL
          for (int half = 0; half < 2; ++half) {
            const Pixel pixel(args_, place, row(i) + lane() / 4 + half * 8);
            if (!pixel.inside) continue;
            RF_UNROLL
            for (int group = 0; group < kGroups; ++group) {
              residual[i][half][group] = load_residual(place, pixel, part * Tile::MID + channel(group));
            }
          }
        }
      }
      Sums<Tile::kTilesM, Tile::kTilesN> sums = {};
      RF_UNROLL
      for (int slice = 0; slice < Tile::kSlices; ++slice) {
        next_weights();
        SharedAddress a[Tile::kTilesM];
        RF_UNROLL
        for (int i = 0; i < Tile::kTilesM; ++i) a[i] = hidden_row[i] + slice * Tile::kHiddenSlice;
        multiply<T>(sums, a, weights());
      }
      Sums<Tile::kTilesM, Tile::kTilesN> projected = {};
      if constexpr (Tile::PROJECT) {
        normalize(sums, part);
        RF_ROLLED
        for (int slice = 0; slice < Tile::kSlicesX; ++slice) {
          next_weights();
          SharedAddress a[Tile::kTilesM];
          RF_UNROLL
          for (int i = 0; i < Tile::kTilesM; ++i) a[i] = centre_row[i] + slice * Tile::kCentreSlice;
          multiply<T>(projected, a, weights());
        }
      }
      store(sums, projected, residual, place, part);
    }
  }

  // A pixel of the tile as a pixel of the output, and whether the image has it.
  struct Pixel {
    int p, q;
    bool inside;

    RF_DEVICE Pixel(const Args& args, const Place<Tile>& place, int index)
        : p(place.p0 + index / Tile::TILE_W),
          q(place.q0 + index % Tile::TILE_W),
          inside(index < Tile::kPixels && p < args.p && q < args.q) {}
  };

  RF_DEVICE Eight load_residual(const Place<Tile>& place, const Pixel& pixel, int channel) const {
    const T* image = static_cast<const T*>(args_.x) + place.n * args_.x_stride_n;
    return load_global<Eight>(image + (pixel.p * args_.x_stride_h + pixel.q * args_.x_stride_w + channel));
  }

  // The third batch norm on sums that still wait for the projection.
  template <class S>
  RF_DEVICE void normalize(S& sums, int part) const {
    RF_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const Affine affine(shared_ + Tile::kTable3, part * Tile::MID + channel(group));
      RF_UNROLL
      for (int i = 0; i < Tile::kTilesM; ++i) {
        RF_UNROLL
        for (int at = 0; at < 16; ++at) {
          float& sum = sums[i][group * 4 + at / 4][at % 4];
          sum = affine.apply(sum, at / 4 * 2 + at % 2);
        }
      }
    }
  }

  template <class S, class Residual>
  RF_DEVICE void store(const S& sums, const S& projected, const Residual& residual, const Place<Tile>& place,
                       int part) const {
    const int first = part * Tile::MID;
    const SharedAddress table = shared_ + (Tile::PROJECT ? Tile::kTableShortcut : Tile::kTable3);
    each_eight<Tile::kTilesM>(table, first, [&](int i, int half, int group, const Affine& affine) {
      const int channels = first + channel(group);
      const Pixel pixel(args_, place, row(i) + lane() / 4 + half * 8);
      if (!pixel.inside) return;
      Eight result;
      RF_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int tile = group * 4 + e / 2, at = half * 2 + e % 2;
        float y;
        if constexpr (Tile::PROJECT) {
          y = sums[i][tile][at] + affine.apply(projected[i][tile][at], e);
        } else {
          y = affine.apply(sums[i][tile][at], e) + to_float(residual[i][half][group].at[e]);
        }
        result.at[e] = from_float<T>(relu(y));
      }
      const int64_t at = (static_cast<int64_t>(place.n) * args_.p + pixel.p) * args_.q + pixel.q;
      store_global(static_cast<T*>(args_.out) + (at * Tile::COUT + channels), result);
    });
  }

  // Calls visit(i, half, group, affine) for every eight of this lane's sums: row lane/4 + 8·half of m16 tile i, channels
  // first + channel(group) and on, with their batch norm.
  template <int TILES, class Visit>
  RF_DEVICE static void each_eight(SharedAddress table, int first, Visit&& visit) {
    RF_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const Affine affine(table, first + channel(group));
      RF_UNROLL
      for (int i = 0; i < TILES; ++i) {
        RF_UNROLL
        for (int half = 0; half < 2; ++half) visit(i, half, group, affine);
      }
    }
  }

  // Opens a step: its chunks have landed and everybody is here, so that what the step before has read is free.
  template <int PENDING>
  RF_DEVICE void arrive() {
    async_wait<PENDING>();
    barrier();
  }

  // Sends for weights, where they do not stay, and closes the step's group of copies.
  RF_DEVICE void send() {
    if constexpr (!Tile::RESIDENT) weights_.next();
    async_commit();
  }

  // Opens a step that needs weights alone: nothing is to do where they stay.
  RF_DEVICE void next_weights() {
    if constexpr (!Tile::RESIDENT) {
      arrive<Tile::kPending>();
      send();
    }
  }

  // This warp's rows of the step's chunk of weights.
  RF_DEVICE SharedAddress weights() {
    const SharedAddress slot = shared_ + Tile::kWeights + w_slot_ * Tile::kChunkBytes;
    w_slot_ = w_slot_ + 1 == Tile::W_SLOTS ? 0 : w_slot_ + 1;
    return slot + warp_n() * kSpan * kRowBytes;
  }

  RF_DEVICE static int lane() { return thread_x() % 32; }
  RF_DEVICE static int warp_m() { return thread_x() / 32 % kWarpsM; }
  RF_DEVICE static int warp_n() { return thread_x() / 32 / kWarpsM; }
  RF_DEVICE static int row(int tile) { return (warp_m() * Tile::kTilesM + tile) * 16; }
  RF_DEVICE static int halo_row(int tile) { return (warp_m() * Tile::kHaloTiles + tile) * 16; }
  RF_DEVICE static int channel(int group) { return warp_n() * kSpan + group * 32 + lane() % 4 * 8; }
  // Of the hidden tensors eight pixels are read at once, under eight keys, but two are stored at once, each with four
  // neighbouring chunks: keys that differ in the third bit put these in different banks.
  RF_DEVICE static int turned(int pixel) { return (pixel >> 1 & 3) | (pixel & 1) << 2; }
  // Under one tap neighbouring output pixels have neighbouring indices, at the end of a row of the tile as well.
  RF_DEVICE static int halo_index(int h, int w) { return h / Tile::STRIDE * Tile::TILE_W + w / Tile::STRIDE; }
  // With stride 2 two neighbours in a row have one index, and are told apart by their column.
  RF_DEVICE static int halo_key(int index, int w) {
    return Tile::STRIDE == 1 ? turned(index) : (index & 7) ^ (w & 1) << 2;
  }

  RF_DEVICE SharedAddress hidden(int channel, int pixel, int key) const {
    return shared_ + Tile::kHidden + channel / kDepth * Tile::kHiddenSlice +
           chunk_at(pixel, channel % kDepth / 8, key);
  }

  template <class S>
  RF_DEVICE static Eight rectified(const S& sums, const Affine& affine, int tile, int group, int half) {
    Eight result;
    RF_UNROLL
    for (int e = 0; e < 8; ++e) {
      result.at[e] = from_float<T>(relu(affine.apply(sums[tile][group * 4 + e / 2][half * 2 + e % 2], e)));
    }
    return result;
  }

  const Args& args_;
  SharedAddress shared_;
  WeightStream<T, Tile> weights_;
  InputStream<T, Tile> input_;
  int w_slot_ = 0, x_slot_ = 0;  // of the step that comes next
};

template <class T, class Tile>
RF_KERNEL(kThreads, Tile::BLOCKS)
bottleneck_kernel(RF_CONSTANT Args args) {
  Block<T, Tile>(args).run();
}

}  // namespace rf::bottleneck
