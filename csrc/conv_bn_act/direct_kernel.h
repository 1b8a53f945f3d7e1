// A convolution on the CPU as the sum is written, channels_last: a matrix product of the pixels' windows with the
// filters, in float32 or of bfloat16 with sums in float32, with batch norm, residual and ReLU applied to the sums while
// they are in registers.
//
// A thread takes a few pixels at a time. It copies a part of their windows side by side (rows of a buffer that stays in
// the first-level cache), and multiplies it with the same part of the filters of 32 output channels after 32, which
// pass by once. The sums of parts are added up in the buffer, which rounds less than one long sum does.
//
// Included once per instruction set, with RF_ISA the name of its namespace, RF_LANES the floats of its vectors and
// RF_BF16 the element: bfloat16 or float.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_bn_act/direct.h"
#include "conv_bn_act/vectors.h"

namespace rf::direct::RF_ISA {

namespace {

using namespace vectors::RF_ISA;

// An output pixel's window: where it begins in its image, borders included.
struct Window {
  const Element* image;
  Index row, column;
};

void find_windows(const Problem& p, Index first, Index count, Window* windows) {
  Index x = first % p.out_width, y = first / p.out_width % p.out_height;
  const Index size = p.height * p.width * p.channels;
  const Element* image = static_cast<const Element*>(p.x) + first / (p.out_width * p.out_height) * size;
  for (Index i = 0; i < count; ++i) {
    windows[i] = {image, y * p.stride_height - p.pad_height, x * p.stride_width - p.pad_width};
    if (++x < p.out_width) continue;
    x = 0;
    if (++y < p.out_height) continue;
    y = 0, image += size;
  }
}

// Copies whole vectors, beyond count where `end` allows to read there: what is written there too is not yet filled.
inline void copy(Element* to, const Element* from, Index count, const Element* end) {
  constexpr Index kStep = kLanes * kElements;
  const Index whole = end - from < (count + kStep - 1) / kStep * kStep ? count / kStep * kStep : count;
  Index i = 0;
  for (; i < whole; i += kStep) std::memcpy(to + i, from + i, sizeof(Vector));
  if (i < count) std::memcpy(to + i, from + i, (count - i) * sizeof(Element));
}

// Elements [begin, begin + count) of each window, side by side. Where taps lie side by side in the image (no dilation
// along it), a row of the filter is one run of elements; else each tap is one.
void copy_windows(const Problem& p, const Window* windows, Index pixels, Index begin, Index count, Element* to) {
  if (count == 0) return;
  const bool adjacent = p.dilate_width == 1;
  const Index across = adjacent ? 1 : p.kernel_width, length = (adjacent ? p.kernel_width : 1) * p.channels;
  const Element* const end = static_cast<const Element*>(p.x) + p.images * p.height * p.width * p.channels;
  Index run = begin / length, first = begin % length;  // first: of the run
  for (; count > 0; ++run, first = 0) {
    const Index last = count < length - first ? first + count : length;
    const Index down = run / across * p.dilate_height, right = run % across * p.dilate_width;
    for (Index i = 0; i < pixels; ++i) {
      const Index r = windows[i].row + down, c = windows[i].column + right;
      Element* const row = to + i * kStride * kElements;
      const auto from = [&](Index at) { return windows[i].image + (r * p.width + c) * p.channels + at; };
      if (r < 0 || r >= p.height) {
        std::memset(row, 0, (last - first) * sizeof(Element));
      } else if (c >= 0 && c * p.channels + last <= p.width * p.channels) {
        copy(row, from(first), last - first, end);
      } else {  // a part of the run lies inside
        Index low = c < 0 ? -c * p.channels : 0, high = c < p.width ? (p.width - c) * p.channels : 0;
        low = low < first ? first : low > last ? last : low;
        high = high < low ? low : high > last ? last : high;
        std::memset(row, 0, (low - first) * sizeof(Element));
        if (low < high) std::memcpy(row + low - first, from(low), (high - low) * sizeof(Element));
        std::memset(row + high - first, 0, (last - high) * sizeof(Element));
      }
    }
    to += last - first, count -= last - first;
  }
}

// The same of windows whose channels are outermost: taps are gathered one by one.
void gather_windows(const Problem& p, const Window* windows, Index pixels, Index begin, Index count, Element* to) {
  const Index taps = p.kernel_height * p.kernel_width;
  for (Index tap = 0; tap < taps; ++tap) {
    const auto channel = [&](Index element) { return element > tap ? (element - tap + taps - 1) / taps : 0; };
    const Index first = channel(begin), channels = channel(begin + count) - first;
    const Index down = tap / p.kernel_width * p.dilate_height, right = tap % p.kernel_width * p.dilate_width;
    Element* row = to + first * taps + tap - begin;
    for (Index i = 0; i < pixels; ++i, row += kStride * kElements) {
      const Index r = windows[i].row + down, c = windows[i].column + right;
      if (r >= 0 && r < p.height && c >= 0 && c < p.width) {
        const Element* const from = windows[i].image + (r * p.width + c) * p.channels + first;
        for (Index at = 0; at < channels; ++at) row[at * taps] = from[at];
      } else {
        for (Index at = 0; at < channels; ++at) row[at * taps] = Element{};
      }
    }
  }
}

// Elements [begin, begin + count) of the sums of one panel, from filters that are not packed, as they are packed:
// [units, 32 channels]. False: one of them is infinite or NaN.
bool pack(const Problem& p, Index panel, Index begin, Index count, float* to) {
  const Index depth = p.depth(), whole = count / (kLanes * kElements) * kLanes;
  const Element* const from = static_cast<const Element*>(p.filters) + panel * kPanel * depth + begin;
  Vector seen = zero();  // stays zero while everything is finite
  for (Index k = 0; k < kPanel; k += kLanes) {
    for (Index unit = 0; unit < whole; unit += kLanes) {
      Vector rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const Element* const at = from + (k + i) * depth + unit * kElements;
        std::memcpy(&rows[i], at, sizeof(Vector));
        __builtin_prefetch(at + kUnits * kElements);  // of the next part
        see(seen, at);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (unit + i) * kPanel + k, rows[i]);
    }
  }
  bool finite = true;
  for (Index unit = whole; unit * kElements < count; ++unit) {
    for (Index k = 0; k < kPanel; ++k) {
      Element elements[kElements] = {};
      for (Index e = 0; e < kElements && unit * kElements + e < count; ++e) {
        elements[e] = from[k * depth + unit * kElements + e];
        finite &= number(elements[e]) * 0.0f == 0.0f;
      }
      std::memcpy(to + unit * kPanel + k, elements, sizeof(float));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) finite &= seen[lane] == 0.0f;
  return finite;
}

struct Part {
  Index units;
  bool first, last;
};

// sums, or at the last part the output, of ROWS pixels in COLUMNS·lanes channels. out and residual point at these
// channels of the first of the pixels, which lie K elements apart; sums lie 32 apart.
template <int ROWS, int COLUMNS>
inline void multiply(const Problem& p, const Part& part, const float* left, const float* right, Ahead ahead, float* sums,
                     Index offset, Index channel) {
  Vector sum[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) sum[r][j] = zero();
  }
  const Element* const residual = p.residual ? static_cast<const Element*>(p.residual) + offset : nullptr;
  Element* const out = static_cast<Element*>(p.out) + offset;
  if (part.last) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) __builtin_prefetch(out + r * p.out_channels + j * kLanes, 1);
    }
    if (residual) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; ++j) __builtin_prefetch(residual + r * p.out_channels + j * kLanes);
      }
    }
  }
  for (Index i = 0; i < part.units; ++i, right += kPanel, ahead.next()) {
    Vector filters[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) {
      filters[j] = load(right + j * kLanes);
      ahead.fetch(j);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) add_product(sum[r][j], left + r * kStride + i, filters[j]);
    }
  }
  if (!part.first) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) sum[r][j] += load(sums + r * kPanel + j * kLanes);
    }
  }
  if (!part.last) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) store(sums + r * kPanel + j * kLanes, sum[r][j]);
    }
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < COLUMNS; ++j) {
    const Vector scale = load(p.scale + channel + j * kLanes), bias = load(p.bias + channel + j * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Index at = r * p.out_channels + j * kLanes;
      Vector value = sum[r][j] * scale + bias;
      if (residual) value += load(residual + at);
      if (p.relu) value = value < zero() ? zero() : value;
      store(out + at, value);
    }
  }
}

// The output of one pixel in one panel from its sums.
inline void finish(const Problem& p, const float* sums, Index offset, Index channel) {
  for (int j = 0; j < kPanel; j += kLanes) {
    Vector value = load(sums + j) * load(p.scale + channel + j) + load(p.bias + channel + j);
    if (p.residual) value += load(static_cast<const Element*>(p.residual) + offset + j);
    if (p.relu) value = value < zero() ? zero() : value;
    store(static_cast<Element*>(p.out) + offset + j, value);
  }
}

// Products of elements [begin, begin + count) of ROWS windows (rows of left, filled up with zero to a whole vector) with
// those of the filters of one panel, as they lie, in sums [ROWS, 32, lanes]. False as in pack.
template <int ROWS>
bool dot(const Problem& p, const Part& part, Index panel, Index begin, Index count, const float* left, float* sums) {
  constexpr Index kStep = kLanes * kElements;
  constexpr int kFilters = 2;
  const Index depth = p.depth(), whole = count / kStep * kStep;
  const Element* from = static_cast<const Element*>(p.filters) + panel * kPanel * depth + begin;
  Vector seen = zero();
  for (Index k = 0; k < kPanel; k += kFilters, from += kFilters * depth, sums += kFilters * kLanes) {
    Vector sum[ROWS][kFilters];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int f = 0; f < kFilters; ++f) sum[r][f] = part.first ? zero() : load(sums + (r * kPanel + f) * kLanes);
    }
    const auto add = [&](const Element* first, const Element* second, Index unit) {
      Vector right[kFilters];
      std::memcpy(&right[0], first, sizeof(Vector)), std::memcpy(&right[1], second, sizeof(Vector));
      see(seen, first), see(seen, second);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Vector window = load(left + r * kStride + unit);
#pragma GCC unroll 2
        for (int f = 0; f < kFilters; ++f) add_products(sum[r][f], window, right[f]);
      }
    };
    for (Index at = 0; at < whole; at += kStep) {
      for (int f = 0; f < kFilters; ++f) __builtin_prefetch(from + f * depth + at + kUnits * kElements);  // the next part
      add(from + at, from + depth + at, at / kElements);
    }
    if (whole < count) {
      Element rest[kFilters][kStep] = {};
      for (int f = 0; f < kFilters; ++f) std::memcpy(rest[f], from + f * depth + whole, (count - whole) * sizeof(Element));
      add(rest[0], rest[1], whole / kElements);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int f = 0; f < kFilters; ++f) store(sums + (r * kPanel + f) * kLanes, sum[r][f]);
    }
  }
  return total(seen * 0.0f) == 0.0f;
}

// One part of the sums of a few pixels in all panels from filters as they lie, which are not worth bringing in order.
bool dot_all(const Problem& p, const Part& part, Index begin, Index count, Index first_pixel, Index pixels,
             Index first_panel, Index panels, float* left, float* sums) {
  constexpr Index kStep = kLanes * kElements, kTogether = 4;
  const Index padding = (count + kStep - 1) / kStep * kStep - count;
  for (Index r = 0; r < pixels; ++r) {
    std::memset(reinterpret_cast<Element*>(left + r * kStride) + count, 0, padding * sizeof(Element));
  }
  bool finite = true;
  for (Index panel = first_panel; panel < first_panel + panels; ++panel) {
    for (Index r = 0; r < pixels; r += kTogether) {
      using Dot = bool(const Problem&, const Part&, Index, Index, Index, const float*, float*);
      constexpr Dot* kDots[] = {dot<1>, dot<2>, dot<3>, dot<4>};
      Dot* const run = kDots[(pixels - r < kTogether ? pixels - r : kTogether) - 1];
      finite &= run(p, part, panel, begin, count, left + r * kStride, sums + r * kPanel * kLanes);
    }
    for (Index r = 0; r < pixels; ++r, sums += kPanel * kLanes) {
      if (!part.last) continue;
      float totals[kPanel];
      for (Index k = 0; k < kPanel; ++k) totals[k] = total(load(sums + k * kLanes));
      finish(p, totals, (first_pixel + r) * p.out_channels + panel * kPanel, panel * kPanel);
    }
  }
  return finite;
}

template <int ROWS>
void multiply_rows(Index rows, const Problem& p, const Part& part, const float* left, const float* right,
                   const Ahead& ahead, float* sums, Index offset, Index channel) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      for (int j = 0; j < kPanel; j += kColumns * kLanes) {
        multiply<ROWS, kColumns>(p, part, left, right + j, ahead, sums + j, offset + j, channel + j);
      }
    } else {
      multiply_rows<ROWS - 1>(rows, p, part, left, right, ahead, sums, offset, channel);
    }
  }
}

}  // namespace

// See direct.h.
bool run(const Problem& p, Index first_pixel, Index pixels, Index first_panel, Index panels, float* buffer) {
  float* const left = buffer;
  float* const sums = left + pixels * kStride;
  float* const packed = sums + pixels * panels * kPanel;
  bool finite = true;
  const Index depth = p.depth(), units = (depth + kElements - 1) / kElements;
  // Without input channels there is one part of no units: the sums are zero.
  const Index parts = units > 0 ? (units + kUnits - 1) / kUnits : 1, step = (units + parts - 1) / parts;
  const Index tiles = (pixels + kRows - 1) / kRows;
  Window windows[kMostPixels];
  find_windows(p, first_pixel, pixels, windows);
  for (Index number = 0; number < parts; ++number) {
    const Index at = number * step;
    const Part part{units - at < step ? units - at : step, number == 0, number == parts - 1};
    const Index begin = at * kElements, count = part.last ? depth - begin : part.units * kElements;
    const auto take = p.order == Order::kContiguous ? gather_windows : copy_windows;
    take(p, windows, pixels, begin, count, reinterpret_cast<Element*>(left));
    if (count < part.units * kElements) {
      for (Index r = 0; r < pixels; ++r) reinterpret_cast<Element*>(left + r * kStride)[count] = 0;
    }
    if (p.order != Order::kPacked && p.pixels() <= kFew) {
      finite &= dot_all(p, part, begin, count, first_pixel, pixels, first_panel, panels, left, sums);
      continue;
    }
    for (Index panel = first_panel; panel < first_panel + panels; ++panel) {
      // All panels of one part lie together: they are read in this order.
      const float* const filters = static_cast<const float*>(p.filters);
      const float* right = filters + (at * (p.out_channels / kPanel) + panel * part.units) * kPanel;
      if (p.order != Order::kPacked) {
        finite &= pack(p, panel, begin, count, packed);
        right = packed;
      }
      float* const waiting = sums + (panel - first_panel) * pixels * kPanel;
      for (Index tile = 0; tile < tiles; ++tile) {
        const Index r = tile * pixels / tiles, rows = (tile + 1) * pixels / tiles - r;
        const Ahead ahead(right, part.units * kPanel, tile, tiles);
        multiply_rows<kRows>(rows, p, part, left + r * kStride, right, ahead, waiting + r * kPanel,
                             (first_pixel + r) * p.out_channels + panel * kPanel, panel * kPanel);
      }
    }
  }
  return finite;
}

}  // namespace rf::direct::RF_ISA
