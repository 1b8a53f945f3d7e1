#include <algorithm>

#include "block/block.h"
#include "conv_bn_act/onednn.h"

namespace rf::onednn {

Tensor run(const Block& block) {
  Tensor x = channels_last(block.x);
  OptionalTensor identity;
  if (block.identity) identity = channels_last(*block.identity);

  std::vector<std::vector<int64_t>> sizes{sizes_of(x)};  // of each convolution's input, and of the output
  int64_t largest = 0;
  for (const ConvBN& conv : block.convs) {
    sizes.push_back(conv.output_sizes(sizes.back()));
    largest = std::max(largest, sizes.back()[1] * sizes.back()[2] * sizes.back()[3]);
  }
  const int64_t n = sizes[0][0];
  const int64_t size = sub_batch(n, largest * static_cast<int64_t>(x.element_size()));
  std::vector<Prepared> convs;
  for (size_t i = 0; i < block.convs.size(); ++i) {
    sizes[i][0] = size;
    convs.emplace_back(block.convs[i], sizes[i]);
  }
  std::optional<Prepared> shortcut;
  if (block.shortcut) shortcut.emplace(*block.shortcut, sizes[0]);

  const auto chain = [&](const Tensor& part, const OptionalTensor& addend) {  // without the last ReLU
    Tensor hidden = part;
    for (size_t i = 0; i + 1 < convs.size(); ++i) hidden = relu_(convs[i](hidden));
    if (shortcut) return convs.back()(hidden, (*shortcut)(part), true);
    return convs.back()(hidden, addend ? addend : OptionalTensor(part));
  };
  if (size == n) return relu_(chain(x, identity));
  Tensor out = empty_channels_last(sizes.back(), x);
  for (int64_t at = 0; at < n; at += size) {
    const int64_t count = std::min(size, n - at);
    OptionalTensor addend;
    if (identity) addend = torch::stable::narrow(*identity, 0, at, count);
    relu_into(out, at, chain(torch::stable::narrow(x, 0, at, count), addend));
  }
  return out;
}

}  // namespace rf::onednn
