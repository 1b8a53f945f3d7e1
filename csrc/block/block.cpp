#include "block/block.h"

namespace rf {

Block read_block(Arguments& arguments, int depth) {
  Tensor x = arguments.tensor();
  std::vector<ConvBN> convs;
  for (int i = 0; i < depth; ++i) convs.push_back(read_conv(arguments));
  std::optional<ConvBN> shortcut = read_optional_conv(arguments);
  return {x, convs, shortcut, arguments.optional_tensor()};
}

std::vector<int64_t> check_block(const Block& block) {
  const Tensor& x = block.x;
  check_input(x);
  std::vector<int64_t> sizes = sizes_of(x);
  for (size_t i = 0; i < block.convs.size(); ++i) {
    sizes = check_conv(x, block.convs[i], sizes, "conv" + std::to_string(i + 1));
  }
  if (block.shortcut) {
    STD_TORCH_CHECK(!block.identity, "identity: got a tensor beside shortcut, need at most one of the two");
    const bool same = check_conv(x, *block.shortcut, sizes_of(x), "shortcut") == sizes;
    STD_TORCH_CHECK(same, "shortcut: gives another shape than the block");
  } else if (block.identity) {
    check_addend(*block.identity, sizes, x, "identity");
  } else {
    STD_TORCH_CHECK(sizes_of(x) == sizes, "shortcut: got None, but x of shape ", shape_text(x),
                    " cannot be added to the block's output");
  }
  return sizes;
}

Layout block_layout(const Block& block) {
  const auto through = [](const Layout& x, const ConvBN& conv) {
    return conv_layout(x, conv.weight, conv.output_sizes(x.sizes));
  };
  Layout hidden = layout_of(block.x);
  for (const ConvBN& conv : block.convs) hidden = through(hidden, conv);
  const Layout residual = block.shortcut ? through(layout_of(block.x), *block.shortcut)
                                         : layout_of(block.identity.value_or(block.x));
  return sum_layout(hidden, residual, block.x);
}

}  // namespace rf
