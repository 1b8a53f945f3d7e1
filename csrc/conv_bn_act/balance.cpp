#include "conv_bn_act/balance.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "common/torch.h"
#include "conv_bn_act/instructions.h"

namespace rf::winograd {

using cpu::divide_up;

namespace {

constexpr int64_t kElements = 1 << 15;  // of x, that are worth a thread
constexpr float kLeastEnergy = 0x1p-100f, kMostEnergy = 0x1p126f;

// What is known of some tiles, or of all.
struct Found {
  float largest = 0;   // energy of a tile
  float uneven = 0;    // the largest energy of a tile of which one pixel holds too much
  int64_t tile = 0;    // the first one of the largest energy
  bool known = true;   // no energy is NaN, or too large

  void join(const Found& other) {
    if (other.largest > largest || (other.largest == largest && other.tile < tile)) {
      largest = other.largest, tile = other.tile;
    }
    uneven = std::max(uneven, other.uneven);
    known &= other.known;
  }
};

int64_t across(const Problem& p) { return divide_up(p.out_width, 2); }
int64_t down(const Problem& p) { return divide_up(p.out_height, 2); }

struct Range {
  int64_t begin, end;
};

// The part of four pixels in a row or column from `first` on that lies in an image of `size`.
Range inside(int64_t first, int64_t size) {
  return {std::clamp<int64_t>(first, 0, size), std::clamp<int64_t>(first + 4, 0, size)};
}

// One row of tiles, counted over all images. sum and peak are memory for the columns, with the border around them.
Found look_at_row(const Problem& p, const float* energies, int64_t row, std::vector<float>& sum,
                  std::vector<float>& peak) {
  const int64_t columns = std::max(2 * across(p) + 2, p.width + p.pad_width);
  sum.assign(columns, 0.0f), peak.assign(columns, 0.0f);
  float* const sums = sum.data() + p.pad_width;
  float* const peaks = peak.data() + p.pad_width;
  const Range rows = inside(row % down(p) * 2 - p.pad_height, p.height);
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const float* const at = energies + (row / down(p) * p.height + y) * p.width;
    for (int64_t x = 0; x < p.width; ++x) {
      sums[x] += at[x];
      peaks[x] = std::max(peaks[x], at[x]);
    }
  }
  Found found;
  found.tile = row * across(p);
  for (int64_t i = 0; i < across(p); ++i) {
    const float* const s = sum.data() + 2 * i;
    const float* const m = peak.data() + 2 * i;
    const float energy = s[0] + s[1] + s[2] + s[3];
    const float most = std::max(std::max(m[0], m[1]), std::max(m[2], m[3]));
    found.known &= energy <= kMostEnergy;
    if (energy > found.largest) found.largest = energy, found.tile = row * across(p) + i;
    if (most > kPixelShare * energy) found.uneven = std::max(found.uneven, energy);
  }
  return found;
}

// An element of bfloat16 or float, at any address.
inline float number(const char* at, bool bf16) {
  float value;
  if (!bf16) {
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest energy of a channel of one tile.
float channel_energy(const Problem& p, bool bf16, int64_t tile) {
  const int64_t bytes = bf16 ? 2 : 4;
  const int64_t row = tile / across(p);
  const Range rows = inside(row % down(p) * 2 - p.pad_height, p.height);
  const Range columns = inside(tile % across(p) * 2 - p.pad_width, p.width);
  std::vector<float> energy(p.channels);
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t x = columns.begin; x < columns.end; ++x) {
      const int64_t pixel = (row / down(p) * p.height + y) * p.width + x;
      const char* const from = static_cast<const char*>(p.x) + pixel * p.channels * bytes;
      for (int64_t c = 0; c < p.channels; ++c) {
        const float value = number(from + c * bytes, bf16);
        energy[c] += value * value;
      }
    }
  }
  return *std::max_element(energy.begin(), energy.end());
}

}  // namespace

bool balanced(const Problem& p, bool bf16, Energies* energies) {
  const int64_t pixels = p.images * p.height * p.width, rows = p.images * down(p);
  if (pixels * p.channels == 0) return true;
  const Tensor memory = torch::stable::empty({pixels}, ScalarType::Float);
  float* const energy = static_cast<float*>(memory.data_ptr());
  torch::stable::parallel_for(0, pixels, divide_up(kElements, p.channels), [&](int64_t begin, int64_t end) {
    energies(p, begin, end - begin, energy + begin);
  });
  Found found;
  std::mutex mutex;
  torch::stable::parallel_for(0, rows, divide_up(kElements, 4 * p.width), [&](int64_t begin, int64_t end) {
    std::vector<float> sum, peak;
    Found part;
    part.tile = begin * across(p);
    for (int64_t row = begin; row < end; ++row) part.join(look_at_row(p, energy, row, sum, peak));
    const std::lock_guard<std::mutex> lock(mutex);
    found.join(part);
  });
  if (!found.known || found.largest < kLeastEnergy || found.uneven >= kLargeShare * found.largest) return false;
  return channel_energy(p, bf16, found.tile) <= kChannelShare * found.largest;
}

}  // namespace rf::winograd
