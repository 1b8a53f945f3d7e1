// Whether Winograd's sums round no worse than direct ones do.
//
// A direct sum rounds in proportion to what it adds up. Winograd's transforms first mix the 16 pixels of a tile, so that
// an output rounds in proportion to all of them. Among pixels of about one size that comes to the same. Where one pixel
// holds most of a tile's energy (its sum of squares), or one channel does, few terms count: a direct sum rounds less
// for it, and Winograd as much as always; in bfloat16, where the transformed factors are rounded, less averages out.
// Only tiles with a good part of the largest energy matter: the error budget is measured by the largest error.
#pragma once

#include "conv_bn_act/winograd.h"

namespace rf::winograd {

constexpr float kPixelShare = 0.5f;    // of a tile's energy in one pixel: no more
constexpr float kChannelShare = 0.4f;  // of the largest tile's energy in one channel: no more
constexpr float kLargeShare = 0.25f;   // of the largest tile's energy: tiles with less do not count

// False also where squares of the input overflow, underflow or are NaN: this cannot tell then.
bool balanced(const Problem& problem, bool bf16, Energies* energies);

}  // namespace rf::winograd
