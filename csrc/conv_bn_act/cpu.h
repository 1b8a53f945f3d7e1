// The convolutions that this project computes on the CPU itself, between tensors: conv_bn_act with packed parameters.
#pragma once

#include "common/torch.h"

namespace rf::cpu {

// kUnpacked: the direct sum too, whose filters are the weight itself, contiguous or in channels_last.
enum class Method : int64_t { kDirect, kWinograd, kUnpacked };

// A convolution with its batch norm: what the method made of the weight; float32 [K] that multiply and add to the sums.
struct Convolution {
  Method method;
  Tensor filters, scale, bias;
  Pair kernel, stride, padding, dilation;

  std::vector<int64_t> output_sizes(const std::vector<int64_t>& x) const;
};

// Convolutions from what the operators take: filters, scale and bias of each, and nine integers, the method and then
// the pairs in the order above.
std::vector<Convolution> read(const std::vector<Tensor>& packed, const std::vector<int64_t>& geometry);

// out = act(conv(x)·scale + bias + residual), all of them dense in channels_last; residual may be out itself. Raises what
// does not fit, naming the argument. isa: the instructions to use, or "" for the widest. False: the direct sum
// has to be asked, since the method's transforms would round too much of this input, or may be why an output is not
// finite; of kUnpacked, that padding met a filter that is not finite.
bool convolve(const Convolution& conv, const Tensor& x, const OptionalTensor& residual, bool relu, const Tensor& out,
              const std::string& isa);

}  // namespace rf::cpu
