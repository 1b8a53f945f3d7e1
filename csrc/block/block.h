// A residual block as data: relu(conv_n(… relu(conv_1(x)) …) + shortcut), each convolution with its batch norm.
#pragma once

#include "common/conv_bn.h"
#include "common/reference.h"

namespace rf {

// The shortcut projects x; identity is added as it is. At most one of the two is there; with neither, x is added.
struct Block {
  Tensor x;
  std::vector<ConvBN> convs;
  std::optional<ConvBN> shortcut;
  OptionalTensor identity;
};

// The op's arguments before the backend, for a block of `depth` convolutions.
Block read_block(Arguments& arguments, int depth);

// The output's sizes; throws, naming the argument, unless the block is sound.
std::vector<int64_t> check_block(const Block& block);

// The layout of what aten's operators give.
Layout block_layout(const Block& block);

// The block as a chain of convolve(x, conv, residual, relu).
template <class Convolve>
Tensor run_chain(const Block& block, Convolve&& convolve) {
  Tensor hidden = block.x;
  for (size_t i = 0; i + 1 < block.convs.size(); ++i) hidden = convolve(hidden, block.convs[i], OptionalTensor(), true);
  Tensor residual = block.identity.value_or(block.x);
  if (block.shortcut) residual = convolve(block.x, *block.shortcut, OptionalTensor(), false);
  return convolve(hidden, block.convs.back(), OptionalTensor(residual), true);
}

namespace onednn {

// A chain of fused convolutions over one sub-batch of images at a time: its intermediates are freed and used again by
// the next; the last ReLU writes into the result.
Tensor run(const Block& block);

}  // namespace onednn

}  // namespace rf
