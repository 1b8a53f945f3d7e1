// Brings one step of the reduction, BM rows of pixels and BN rows of weights, into a stage of shared memory.
#pragma once

#include "common/primitives.cuh"
#include "conv_bn_act/args.h"

namespace rf::conv {

// A stage holds rows of ROW_BYTES along the reduction, cut in 16-byte chunks. Chunks are permuted within a row so that
// eight neighbouring rows at one chunk index lie in different banks: what ldmatrix reads at once.
template <int ROW_BYTES>
RF_DEVICE int chunk_offset(int row, int chunk) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128);
  const int permuted = ROW_BYTES == 128 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
  return row * ROW_BYTES + permuted * 16;
}

// A place in the reduction: one filter tap and a channel within the group.
struct Tap {
  int c, dh, dw;  // dh and dw are the tap's offsets in pixels, dilation included

  RF_DEVICE void seek(const Args& args, int channels, int index) {
    const int tap = index / channels;
    c = index - tap * channels;
    dh = tap / args.s * args.dilation_h;
    dw = tap % args.s * args.dilation_w;
  }

  RF_DEVICE void advance(const Args& args, int channels, int elements) {
    c += elements;
    while (c >= channels) {
      c -= channels;
      dw += args.dilation_w;
      if (dw == args.s * args.dilation_w) {
        dw = 0;
        dh += args.dilation_h;
      }
    }
  }

  RF_DEVICE bool inside(const Args& args) const { return dh < args.r * args.dilation_h; }
  RF_DEVICE int64_t offset(const Args& args) const { return dh * args.x_stride_h + dw * args.x_stride_w + c; }
};

// COPY elements move at once; channels per group are a multiple of it, so a copy stays within one tap.
template <class T, int BM, int BN, int ROW_BYTES, int THREADS, int COPY>
class Loader {
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunksPerRow = ROW_BYTES / 16;
  static constexpr int kRowsAtOnce = THREADS / kChunksPerRow;
  static constexpr int kRowsA = BM / kRowsAtOnce;
  static constexpr int kRowsB = BN / kRowsAtOnce;
  static constexpr int kStep = ROW_BYTES / static_cast<int>(sizeof(T));
  static_assert(BM % kRowsAtOnce == 0 && BN % kRowsAtOnce == 0 && kRowsA > 0 && kRowsB > 0);

 public:
  static constexpr int kStageBytes = (BM + BN) * ROW_BYTES;

  RF_DEVICE Loader(const Args& args, int64_t m0, int n0, int group, int first_step)
      : args_(args), channels_(args.c / args.groups), depth_(args.r * args.s * channels_) {
    const int thread = thread_x();
    chunk_ = thread % kChunksPerRow;
    row_ = thread / kChunksPerRow;
    index_ = first_step * kStep + chunk_ * kChunk;
    tap_.seek(args, channels_, index_);

    const int pixels = args.p * args.q;
    const int64_t image = m0 / pixels;
    const auto first = static_cast<uint32_t>(m0 - image * pixels);
    RF_UNROLL
    for (int i = 0; i < kRowsA; ++i) {
      const uint32_t pixel = first + static_cast<uint32_t>(row_ + i * kRowsAtOnce);
      const uint32_t skipped = pixel / static_cast<uint32_t>(pixels);
      const int rest = static_cast<int>(pixel - skipped * static_cast<uint32_t>(pixels));
      const int p = rest / args.q;
      const int64_t n = image + skipped;
      h_[i] = n < args.n ? p * args.stride_h - args.pad_h : kOutside;
      w_[i] = (rest - p * args.q) * args.stride_w - args.pad_w;
      base_[i] = n * args.x_stride_n + h_[i] * args.x_stride_h + w_[i] * args.x_stride_w +
                 static_cast<int64_t>(group) * channels_;
    }
    const int channels_out = args.k / args.groups;
    RF_UNROLL
    for (int i = 0; i < kRowsB; ++i) {
      const int k = n0 + row_ + i * kRowsAtOnce;
      weight_row_[i] = k < channels_out ? (static_cast<int64_t>(group) * channels_out + k) * depth_ : -1;
    }
  }

  // Fills the stage and moves on by one step.
  RF_DEVICE void load(SharedAddress stage) {
    if constexpr (COPY * sizeof(T) >= 4) {
      Tap tap = tap_;
      RF_UNROLL
      for (int part = 0; part < kChunk; part += COPY) {
        load_copies(stage, tap, part);
        if (part + COPY < kChunk) tap.advance(args_, channels_, COPY);
      }
    } else {
      load_elements(stage);
    }
    index_ += kStep;
    tap_.advance(args_, channels_, kStep);
  }

 private:
  static constexpr int kOutside = -(1 << 30);

  RF_DEVICE bool on_image(int row, const Tap& tap) const {
    return static_cast<unsigned>(h_[row] + tap.dh) < static_cast<unsigned>(args_.h) &&
           static_cast<unsigned>(w_[row] + tap.dw) < static_cast<unsigned>(args_.w) && tap.inside(args_);
  }

  RF_DEVICE void load_copies(SharedAddress stage, const Tap& tap, int part) {
    constexpr int kBytes = COPY * static_cast<int>(sizeof(T));
    const T* x = static_cast<const T*>(args_.x);
    const T* weight = static_cast<const T*>(args_.weight);
    const int64_t offset = tap.offset(args_);
    const SharedAddress to = stage + part * static_cast<int>(sizeof(T));
    RF_UNROLL
    for (int i = 0; i < kRowsA; ++i) {
      const bool valid = on_image(i, tap);
      const int row = row_ + i * kRowsAtOnce;
      async_copy<kBytes>(to + chunk_offset<ROW_BYTES>(row, chunk_), valid ? x + (base_[i] + offset) : x, valid);
    }
    RF_UNROLL
    for (int i = 0; i < kRowsB; ++i) {
      const bool valid = weight_row_[i] >= 0 && index_ + part < depth_;
      const int row = BM + row_ + i * kRowsAtOnce;
      async_copy<kBytes>(to + chunk_offset<ROW_BYTES>(row, chunk_),
                         valid ? weight + (weight_row_[i] + index_ + part) : weight, valid);
    }
  }

  // Two-byte elements one by one: no asynchronous copy is that small.
  RF_DEVICE void load_elements(SharedAddress stage) {
    const T* x = static_cast<const T*>(args_.x);
    const T* weight = static_cast<const T*>(args_.weight);
    RF_UNROLL
    for (int i = 0; i < kRowsA; ++i) {
      Vector<T, kChunk> chunk{};
      Tap tap = tap_;
      RF_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        if (on_image(i, tap)) chunk.at[e] = x[base_[i] + tap.offset(args_)];
        tap.advance(args_, channels_, 1);
      }
      store_shared(stage + chunk_offset<ROW_BYTES>(row_ + i * kRowsAtOnce, chunk_), chunk);
    }
    RF_UNROLL
    for (int i = 0; i < kRowsB; ++i) {
      Vector<T, kChunk> chunk{};
      RF_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        if (weight_row_[i] >= 0 && index_ + e < depth_) chunk.at[e] = weight[weight_row_[i] + index_ + e];
      }
      store_shared(stage + chunk_offset<ROW_BYTES>(BM + row_ + i * kRowsAtOnce, chunk_), chunk);
    }
  }

  const Args& args_;
  int channels_, depth_;
  int chunk_, row_, index_;
  Tap tap_;
  int h_[kRowsA], w_[kRowsA];
  int64_t base_[kRowsA];
  int64_t weight_row_[kRowsB];
};

}  // namespace rf::conv
