// The public ops of a process without Python: schemas, the choice of who computes a call, registration.
//
// In a Python process the package resnet_fused registers these ops itself, with its own choice among more backends; then
// this file registers nothing. Loaded before the package, the library's ops stay, and the package adds its rules for
// autograd, autocast and fake tensors to them.
#include <algorithm>
#include <memory>

#include "block/block.h"
#include "common/reference.h"
#include "conv_bn_act/onednn.h"
#ifdef RF_CUDA
#include "add_relu/ops.h"
#include "bottleneck/ops.h"
#include "conv_bn_act/ops.h"
#endif

#include "schemas.h"

// Defined by the Python module _C, which has this library loaded as its dependency; absent where nothing else did.
extern "C" __attribute__((weak)) const int resnet_fused_python_registers_ops;

namespace rf {

namespace {

using torch::stable::detail::StableLibrary;

void check_backend(const std::string& backend, const char* able, const char* op) {
  STD_TORCH_CHECK(backend == "auto" || backend == "reference" || backend == able, op, ": backend='", backend,
                  "' cannot run here; use 'auto', 'reference' or '", able, "'");
}

bool by_onednn(const Tensor& x, const std::string& backend, const char* op) {
  check_backend(backend, "onednn", op);
  const bool able = onednn::supports(x.scalar_type());
  STD_TORCH_CHECK(able || backend != "onednn", op, ": oneDNN has no convolution in this dtype here");
  return able && backend != "reference" && x.numel() > 0;
}

// Some output sees nothing but padding: oneDNN then writes beyond its memory.
bool window_in_padding(const ConvBN& conv) {
  for (int i = 0; i < 2; ++i) {
    if (conv.padding[i] > conv.dilation[i] * (conv.weight.size(2 + i) - 1)) return true;
  }
  return false;
}

bool window_in_padding(const Block& block) {
  const auto in_padding = [](const ConvBN& conv) { return window_in_padding(conv); };
  return std::any_of(block.convs.begin(), block.convs.end(), in_padding) ||
         (block.shortcut && window_in_padding(*block.shortcut));
}

Tensor convolve(const Tensor& x, const ConvBN& conv, const OptionalTensor& residual, bool relu,
                const std::string& backend) {
  if (x.is_cpu()) {
    if (!by_onednn(x, backend, "conv_bn_act")) return reference(x, conv, residual, relu);
    if (window_in_padding(conv)) {
      STD_TORCH_CHECK(backend != "onednn", "conv_bn_act: backend='onednn': padding is as wide as the filter");
      return reference(x, conv, residual, relu);
    }
    return onednn::run(x, conv, residual, relu);
  }
  check_backend(backend, "cuda", "conv_bn_act");
#ifdef RF_CUDA
  // float32 is multiplied in IEEE arithmetic: the stable ABI does not tell whether TF32 is allowed.
  const char* refusal = x.numel() == 0 ? "nothing to compute" : conv::refusal_of(x, conv);
  STD_TORCH_CHECK(!refusal || backend != "cuda" || x.numel() == 0, "conv_bn_act: backend='cuda': ", refusal);
  if (!refusal && backend != "reference") return conv::run_cuda(x, conv, residual, relu, false, "", 0);
#else
  STD_TORCH_CHECK(backend != "cuda", "conv_bn_act: this library was built without CUDA kernels");
#endif
  return reference(x, conv, residual, relu);
}

// What aten's own operators computed needs no other layout.
bool has_eagers_strides(const Tensor& x, const std::string& backend) {
  return backend == "reference" || x.scalar_type() == ScalarType::Double || x.numel() == 0;
}

void conv_bn_act_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const ConvBN conv = read_conv(arguments);
  const OptionalTensor residual = arguments.optional_tensor();
  const std::string act = arguments.text(), backend = arguments.text();
  check_input(x);
  const std::vector<int64_t> sizes = check_conv(x, conv, sizes_of(x));
  if (residual) check_addend(*residual, sizes, x, "residual");
  STD_TORCH_CHECK(act == "relu" || act == "none", "act: got '", act, "', need 'relu' or 'none'");
  const Tensor out = convolve(x, conv, residual, act == "relu", backend);
  if (has_eagers_strides(x, backend)) return give(stack, out);
  Layout layout = conv_layout(layout_of(x), conv.weight, sizes);
  if (residual) layout = sum_layout(layout, layout_of(*residual), x);
  give(stack, laid_out(out, layout));
}

template <int DEPTH>
void block_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Block block = read_block(arguments, DEPTH);
  const std::string backend = arguments.text();
  check_block(block);
  if (block.x.is_cpu() && by_onednn(block.x, backend, "block") && !window_in_padding(block)) {
    return give(stack, laid_out(onednn::run(block), block_layout(block)));
  }
#ifdef RF_CUDA
  if (DEPTH == 3 && backend == "cuda" && block.x.is_cuda() && block.x.numel() > 0 && !bottleneck::refusal_of(block)) {
    return give(stack, laid_out(bottleneck::run_cuda(block, ""), block_layout(block)));
  }
#endif
  const Tensor out = run_chain(block, [&](const Tensor& x, const ConvBN& conv, const OptionalTensor& residual,
                                          bool relu) { return convolve(x, conv, residual, relu, backend); });
  give(stack, has_eagers_strides(block.x, backend) ? out : laid_out(out, block_layout(block)));
}

void add_relu_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor a = arguments.tensor(), b = arguments.tensor();
  const std::string backend = arguments.text();
  STD_TORCH_CHECK(sizes_of(a) == sizes_of(b), "b: got shape ", shape_text(b), ", need that of a, ", shape_text(a));
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "b: need the dtype of a");
  STD_TORCH_CHECK(a.device() == b.device(), "b: need the device of a");
  check_backend(backend, a.is_cpu() ? "reference" : "cuda", "add_relu");
#ifdef RF_CUDA
  const bool able = add_relu::supports(a, b);
  if (a.is_cuda() && backend != "reference" && able && a.numel() > 0) return give(stack, add_relu::run_cuda(a, b));
  STD_TORCH_CHECK(backend != "cuda" || a.numel() == 0, "add_relu: backend='cuda' does not take this dtype or layout");
#endif
  give(stack, call("aten::relu_", "", torch::stable::subtract(a, b, -1.0)));
}

struct DeleteLibrary {
  void operator()(TorchLibraryHandle library) const { aoti_torch_delete_library_object(library); }
};

class PublicOps {
 public:
  PublicOps() {
    if (&resnet_fused_python_registers_ops) return;
    TorchLibraryHandle fragment = nullptr;
    check(aoti_torch_library_init_fragment("resnet_fused", __FILE__, __LINE__, &fragment), "library_init_fragment");
    std::unique_ptr<TorchLibraryOpaque, DeleteLibrary> definitions(fragment);
    for (const char* schema : kSchemas) {
      // StableLibrary::def of torch 2.11 drops this error.
      if (aoti_torch_library_def(fragment, schema) != AOTI_TORCH_SUCCESS) return;  // the Python package came first
    }
    definitions_ = std::move(definitions);
    for (size_t i = 0; i < kernels_.size(); ++i) {
      const char* key = i == 0 ? "CPU" : "CUDA";
      kernels_[i] = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "resnet_fused", key, __FILE__, __LINE__);
      kernels_[i]->impl("add_relu", &add_relu_op);
      kernels_[i]->impl("conv_bn_act", &conv_bn_act_op);
      kernels_[i]->impl("basic_block", &block_op<2>);
      kernels_[i]->impl("bottleneck", &block_op<3>);
    }
  }

 private:
  std::unique_ptr<TorchLibraryOpaque, DeleteLibrary> definitions_;
  std::array<std::unique_ptr<StableLibrary>, 2> kernels_;
};

const PublicOps public_ops;

}  // namespace

}  // namespace rf
