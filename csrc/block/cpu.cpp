#include "conv_bn_act/cpu.h"

#include <algorithm>

namespace rf::cpu {

namespace {

// A residual block, `images` images at a time, whose intermediates the heap gives to the next ones again. The last
// convolution is the projection where there is one: it is written to out, and read from there as the residual. False,
// with out unfinished, as soon as one of the convolutions says it: see cpu.h.
bool block(const Tensor& x, const std::vector<Convolution>& convs, bool projects, const OptionalTensor& identity,
           const Tensor& out, int64_t images) {
  const size_t depth = convs.size() - (projects ? 1 : 0);
  STD_TORCH_CHECK(depth > 0 && images > 0, "packed: need a convolution, images: need one");
  STD_TORCH_CHECK(!projects || !identity, "identity: got a tensor beside a projection");
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && (!identity || identity->dim() == 4), "x: need 4 dimensions");
  for (int64_t at = 0; at < x.size(0); at += images) {
    const int64_t count = std::min(images, x.size(0) - at);
    const bool whole = count == x.size(0);
    const auto part = [&](Tensor t) { return whole ? t : torch::stable::narrow(t, 0, at, count); };
    const Tensor input = part(x), result = part(out);
    Tensor hidden = input;
    for (size_t i = 0; i + 1 < depth; ++i) {
      const Tensor next = empty_channels_last(convs[i].output_sizes({hidden.size(0), hidden.size(1), hidden.size(2), hidden.size(3)}), x);
      if (!convolve(convs[i], hidden, std::nullopt, true, next, "")) return false;
      hidden = next;
    }
    OptionalTensor residual = result;
    if (projects) {
      if (!convolve(convs[depth], input, std::nullopt, false, result, "")) return false;
    } else {
      residual = identity ? part(*identity) : input;
    }
    if (!convolve(convs[depth - 1], hidden, residual, true, result, "")) return false;
  }
  return true;
}

void boxed_block(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const auto packed = arguments.read<std::vector<Tensor>>();
  const auto geometry = arguments.read<std::vector<int64_t>>();
  const bool projects = arguments.read<bool>();
  const OptionalTensor identity = arguments.optional_tensor();
  const Tensor out = arguments.tensor();
  const auto images = arguments.read<int64_t>();
  stack[0] = torch::stable::detail::from(block(x, read(packed, geometry), projects, identity, out, images));
}

}  // namespace

}  // namespace rf::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "block(Tensor x, Tensor[] packed, int[] geometry, bool projects, Tensor? identity, Tensor(a!) out, int images) "
      "-> bool");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) { m.impl("block", &rf::cpu::boxed_block); }
