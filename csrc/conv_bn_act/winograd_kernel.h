// A 3x3 convolution of stride 1 on the CPU by Winograd's minimal filtering F(2x2, 3x3), channels_last: 16
// multiplications for every 4 outputs of a channel pair, where the direct sum takes 36. In float32, or of bfloat16 with
// the transforms in float32, whose results are rounded to bfloat16 once to be multiplied, with sums in float32.
//
//   Y = Aᵀ [ Σ_c (G g Gᵀ) ⊙ (Bᵀ d B) ] A        Lavin & Gray, Fast Algorithms for Convolutional Neural Networks, 2015
//
// d is a 4x4 piece of the padded image, g the filter, Y a 2x2 piece of the output: a tile. A thread takes a block of
// tiles: it transforms their inputs for all channels (16 matrices of tiles x C, small enough for the second-level
// cache), multiplies them with the transformed filters of 32 output channels at a time, and transforms the products
// into outputs, to which batch norm, residual and ReLU are applied in registers.
//
// Included once per instruction set, with RF_ISA the name of its namespace, RF_LANES the floats of its vectors and
// RF_BF16 the element: bfloat16 or float.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_bn_act/vectors.h"
#include "conv_bn_act/winograd.h"

namespace rf::winograd::RF_ISA {

namespace {

using namespace vectors::RF_ISA;

constexpr int kPanelVectors = kPanel / kLanes;
constexpr Index kStep = kLanes * kElements;  // elements that add_squares takes
constexpr Index kLongSum = 128;

// Bᵀ along one axis.
inline void input_axis(const Vector& d0, const Vector& d1, const Vector& d2, const Vector& d3, Vector* t, int step) {
  t[0 * step] = d0 - d2;
  t[1 * step] = d1 + d2;
  t[2 * step] = d2 - d1;
  t[3 * step] = d1 - d3;
}

struct Tile {
  Index image, row, column;  // of the output's first pixel
};

inline Tile tile_at(const Problem& p, Index number) {
  const Index across = (p.out_width + 1) / 2, down = (p.out_height + 1) / 2;
  return {number / (across * down), number / across % down * 2, number % across * 2};
}

// The 16 transformed values of every channel of one tile: v[ξ·plane + c].
inline void transform_input(const Problem& p, const Tile& tile, Element* v, Index plane) {
  const Index top = tile.row - p.pad_height, left = tile.column - p.pad_width;
  const Element* const x = static_cast<const Element*>(p.x);
  const Element* rows[4];
  bool inside[4];
  for (int i = 0; i < 4; ++i) {
    const bool row_inside = top + i >= 0 && top + i < p.height;
    rows[i] = row_inside ? x + ((tile.image * p.height + top + i) * p.width + left) * p.channels : nullptr;
    inside[i] = left + i >= 0 && left + i < p.width;
  }
  for (Index c = 0; c < p.channels; c += kLanes) {
    Vector t[16];
    for (int i = 0; i < 4; ++i) {
      Vector d[4];
      for (int j = 0; j < 4; ++j) d[j] = rows[i] && inside[j] ? load(rows[i] + j * p.channels + c) : zero();
      input_axis(d[0], d[1], d[2], d[3], t + 4 * i, 1);
    }
    for (int j = 0; j < 4; ++j) {
      Vector u[4];
      input_axis(t[j], t[4 + j], t[8 + j], t[12 + j], u, 1);
      for (int i = 0; i < 4; ++i) store(v + (4 * i + j) * plane + c, u[i]);
    }
  }
}

// m[row, 0:COLUMNS·lanes] = Σ_c v[row, c] · u[c, …] for ROWS rows, of `units` a row; everything that is summed stays in
// registers. `more`: it is added to what m holds.
template <int ROWS, int COLUMNS>
inline void multiply(const float* v, const float* u, Index stride, Index units, bool more, Ahead& ahead, float* m) {
  Vector sum[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) sum[r][j] = zero();
  }
  for (Index c = 0; c < units; ++c, u += kPanel, ahead.next()) {
    Vector right[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) {
      right[j] = load(u + j * kLanes);
      ahead.fetch(j);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) add_product(sum[r][j], v + r * stride + c, right[j]);
    }
  }
  if (more) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) sum[r][j] += load(m + r * kPanel + j * kLanes);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) store(m + r * kPanel + j * kLanes, sum[r][j]);
  }
}

template <int ROWS>
void multiply_rows(Index rows, const float* v, const float* u, Index units, const Ahead& ahead, float* m) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      // A long sum of floats is taken in two: it rounds less, where a direct sum of mostly zeros does too.
      const Index first = kElements == 1 && units >= kLongSum ? units / 2 : units;
      for (int j = 0; j < kPanelVectors; j += kColumns) {
        Ahead now = ahead;
        multiply<ROWS, kColumns>(v, u + j * kLanes, units, first, false, now, m + j * kLanes);
        if (first == units) continue;
        multiply<ROWS, kColumns>(v + first, u + first * kPanel + j * kLanes, units, units - first, true, now,
                                 m + j * kLanes);
      }
    } else {
      multiply_rows<ROWS - 1>(rows, v, u, units, ahead, m);
    }
  }
}

// Where transform_output will write and read, brought near while the products are computed.
inline void fetch_output(const Problem& p, const Tile& tile, Index k) {
  constexpr int kLine = 64 / sizeof(Element);
  const Element* const out = static_cast<const Element*>(p.out);
  const Element* const residual = static_cast<const Element*>(p.residual);
  for (int i = 0; i < 2 && tile.row + i < p.out_height; ++i) {
    const Index row = ((tile.image * p.out_height + tile.row + i) * p.out_width + tile.column) * p.out_channels + k;
    for (int j = 0; j < 2 && tile.column + j < p.out_width; ++j) {
      for (int at = 0; at < kPanel; at += kLine) {
        __builtin_prefetch(out + row + j * p.out_channels + at, 1);
        if (residual) __builtin_prefetch(residual + row + j * p.out_channels + at);
      }
    }
  }
}

// The outputs of one tile in 32 channels from k on; returns NaN in a lane where an output is not finite.
inline Vector transform_output(const Problem& p, const Tile& tile, const float* m, Index plane, Index k, Vector seen) {
  for (int at = 0; at < kPanel; at += kLanes) {
    Vector t[2][4];
    for (int j = 0; j < 4; ++j) {
      const Vector m0 = load(m + j * plane + at), m1 = load(m + (4 + j) * plane + at);
      const Vector m2 = load(m + (8 + j) * plane + at), m3 = load(m + (12 + j) * plane + at);
      t[0][j] = m0 + m1 + m2;
      t[1][j] = m1 - m2 - m3;
    }
    const Vector scale = load(p.scale + k + at), bias = load(p.bias + k + at);
    for (int i = 0; i < 2; ++i) {
      if (tile.row + i >= p.out_height) break;
      const Vector y[2] = {t[i][0] + t[i][1] + t[i][2], t[i][1] - t[i][2] - t[i][3]};
      for (int j = 0; j < 2; ++j) {
        if (tile.column + j >= p.out_width) break;
        const Index pixel = (tile.image * p.out_height + tile.row + i) * p.out_width + tile.column + j;
        const Index offset = pixel * p.out_channels + k + at;
        Vector value = y[j] * scale + bias;
        if (p.residual) value += load(static_cast<const Element*>(p.residual) + offset);
        seen += value * kNearInfinity * 0.0f;
        if (p.relu) value = value < zero() ? zero() : value;
        store(static_cast<Element*>(p.out) + offset, value);
      }
    }
  }
  return seen;
}

}  // namespace

namespace {

// See winograd.h.
bool run(const Problem& p, Index first_tile, Index tiles, Index first_panel, Index panels, float* buffer) {
  const Index units = p.channels / kElements, steps = (tiles + kRows - 1) / kRows;
  const Index v_plane = tiles * units, m_plane = tiles * kPanel, u_plane = units * kPanel;
  float* v = buffer;
  float* m = buffer + 16 * v_plane;
  for (Index t = 0; t < tiles; ++t) {
    transform_input(p, tile_at(p, first_tile + t), reinterpret_cast<Element*>(v + t * units), v_plane * kElements);
  }
  Vector seen = zero();
  for (Index panel = first_panel; panel < first_panel + panels; ++panel) {
    const float* u = static_cast<const float*>(p.filters) + panel * 16 * u_plane;
    for (Index t = 0; t < tiles; ++t) fetch_output(p, tile_at(p, first_tile + t), panel * kPanel);
    for (Index xi = 0; xi < 16; ++xi) {
      for (Index step = 0; step < steps; ++step) {
        const Index t = step * tiles / steps, rows = (step + 1) * tiles / steps - t;
        const Ahead ahead(u + xi * u_plane, u_plane, step, steps);
        multiply_rows<kRows>(rows, v + xi * v_plane + t * units, u + xi * u_plane, units, ahead,
                             m + xi * m_plane + t * kPanel);
      }
    }
    for (Index t = 0; t < tiles; ++t) {
      seen = transform_output(p, tile_at(p, first_tile + t), m + t * kPanel, m_plane, panel * kPanel, seen);
    }
  }
  bool finite = true;
  for (int lane = 0; lane < kLanes; ++lane) finite &= seen[lane] == 0.0f;
  return finite;
}

void energies(const Problem& p, Index first_pixel, Index pixels, float* energy) {
  const Element* x = static_cast<const Element*>(p.x) + first_pixel * p.channels;
  const auto next = [&] {  // of one pixel, not yet added up across the lanes
    Vector sum[2] = {zero(), zero()};
    Index c = 0;
    for (; c + 2 * kStep <= p.channels; c += 2 * kStep) {
      add_squares(sum[0], x + c);
      add_squares(sum[1], x + c + kStep);
    }
    for (; c < p.channels; c += kLanes) {
      const Vector value = load(x + c);
      sum[0] += value * value;
    }
    x += p.channels;
    return sum[0] + sum[1];
  };
  Index i = 0;
  for (; i + kLanes <= pixels; i += kLanes) {
    Vector rows[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r] = next();
    transpose(rows);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int r = 0; r < half; ++r) rows[r] += rows[r + half];
    }
    store(energy + i, rows[0]);
  }
  for (; i < pixels; ++i) energy[i] = total(next());
}

#if !RF_BF16
typedef float Half __attribute__((vector_size(RF_LANES * 2)));
typedef double Doubles __attribute__((vector_size(RF_LANES * 4)));

// G along one axis.
inline void filter_axis(const Doubles& g0, const Doubles& g1, const Doubles& g2, Doubles* u, int step) {
  u[0 * step] = g0;
  u[1 * step] = 0.5 * (g0 + g1 + g2);
  u[2 * step] = 0.5 * (g0 - g1 + g2);
  u[3 * step] = g2;
}

// See winograd.h.
void transform_filters(const float* weight, bool contiguous, Index channels, Index panel, Index first_channel,
                       float* filters) {
  constexpr int kTaps = 9;
  for (Index k = 0; k < kPanel; k += kLanes) {
    const float* const from = weight + (panel * kPanel + k) * channels * kTaps;
    Vector taps[kTaps][kLanes];  // of each input channel, one lane to an output channel
    for (int part = 0; part < kTaps; ++part) {
      Vector rows[kLanes];
      const Index at = contiguous ? first_channel * kTaps + part * kLanes : part * channels + first_channel;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = load(from + i * channels * kTaps + at);
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) {
        const int element = part * kLanes + i;
        (contiguous ? taps[element % kTaps][element / kTaps] : taps[part][i]) = rows[i];
      }
    }
    for (int c = 0; c < kLanes; ++c) {
      for (int half = 0; half < kLanes; half += kLanes / 2) {
        Doubles g[kTaps], t[4][3], u[4];
        for (int tap = 0; tap < kTaps; ++tap) {
          Half narrow;
          std::memcpy(&narrow, reinterpret_cast<const float*>(&taps[tap][c]) + half, sizeof narrow);
          g[tap] = __builtin_convertvector(narrow, Doubles);
        }
        for (int j = 0; j < 3; ++j) filter_axis(g[j], g[3 + j], g[6 + j], &t[0][j], 3);
        for (int i = 0; i < 4; ++i) {
          filter_axis(t[i][0], t[i][1], t[i][2], u, 1);
          for (int j = 0; j < 4; ++j) {
            const Half rounded = __builtin_convertvector(u[j], Half);
            float* const to = filters + ((panel * 16 + 4 * i + j) * channels + first_channel + c) * kPanel + k + half;
            std::memcpy(to, &rounded, sizeof rounded);
          }
        }
      }
    }
  }
}
#endif

}  // namespace

#if RF_BF16
const Kernel kernel{&run, &energies, nullptr, kLanes};
#else
const Kernel kernel{&run, &energies, &transform_filters, kLanes};
#endif

}  // namespace rf::winograd::RF_ISA
