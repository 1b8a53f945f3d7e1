// Single steps of the emulator and of the host's number conversions, for tests that compute them in another way.
#include <cstring>

#include "common/primitives.cuh"
#include "common/torch.h"
#include "host.h"

namespace simt {

namespace {

using rf::Tensor;

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Tensor like(std::vector<int64_t> sizes, const Tensor& tensor) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  return rf::empty_strided(sizes, strides, tensor.scalar_type(), tensor);
}

// Registers of 32 lanes: d [32, 4] float, a [32, 4] and b [32, 2] as bits. Gives d + a·b.
void mma(StableIValue* stack, uint64_t, uint64_t) {
  rf::Arguments arguments(stack);
  const Tensor d = arguments.tensor(), a = arguments.tensor(), b = arguments.tensor();
  const std::string element = arguments.text();
  const Tensor out = like({32, 4}, d);
  launch({1, 1, 1}, 32, 0, [&] {
    const int lane = rf::thread_x();
    float sum[4];
    uint32_t left[4], right[2];
    std::memcpy(sum, pointer<float>(d) + 4 * lane, sizeof sum);
    std::memcpy(left, pointer<int32_t>(a) + 4 * lane, sizeof left);
    std::memcpy(right, pointer<int32_t>(b) + 2 * lane, sizeof right);
    if (element == "bf16") rf::mma<rf::bf16>(sum, left, right);
    if (element == "fp16") rf::mma<rf::fp16>(sum, left, right);
    if (element == "tf32") rf::mma<float>(sum, left, right);
    std::memcpy(pointer<float>(out) + 4 * lane, sum, sizeof sum);
  });
  rf::give(stack, out);
}

template <int COUNT, bool TRANSPOSED>
void read_matrices(const Tensor& memory, const Tensor& rows, const Tensor& out) {
  const auto bytes = static_cast<unsigned>(memory.numel() * 2);
  launch({1, 1, 1}, 32, bytes, [&] {
    const int lane = rf::thread_x();
    for (unsigned at = lane * 2; at < bytes; at += 64) {
      rf::store_shared(rf::dynamic_shared() + at, pointer<int16_t>(memory)[at / 2]);
    }
    rf::barrier();
    uint32_t found[COUNT];
    const auto row = static_cast<rf::SharedAddress>(pointer<int32_t>(rows)[lane]);
    rf::load_matrix<COUNT, TRANSPOSED>(found, rf::dynamic_shared() + row);
    std::memcpy(pointer<int32_t>(out) + COUNT * lane, found, sizeof found);
  });
}

// memory: 16-bit elements of shared memory; rows [32]: the address in bytes that each lane gives. Gives registers
// [32, count].
void load_matrix(StableIValue* stack, uint64_t, uint64_t) {
  rf::Arguments arguments(stack);
  const Tensor memory = arguments.tensor(), rows = arguments.tensor();
  const auto count = arguments.read<int64_t>();
  const bool transposed = arguments.read<bool>();
  const Tensor out = like({32, count}, rows);
  if (count == 1) transposed ? read_matrices<1, true>(memory, rows, out) : read_matrices<1, false>(memory, rows, out);
  if (count == 2) transposed ? read_matrices<2, true>(memory, rows, out) : read_matrices<2, false>(memory, rows, out);
  if (count == 4) transposed ? read_matrices<4, true>(memory, rows, out) : read_matrices<4, false>(memory, rows, out);
  rf::give(stack, out);
}

uint32_t converted(const std::string& what, uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  if (what == "bf16 to float") return rf::bits_of(rf::to_float(rf::bf16{half}));
  if (what == "fp16 to float") return rf::bits_of(rf::to_float(rf::fp16{half}));
  if (what == "float to bf16") return rf::from_float<rf::bf16>(rf::float_of(bits)).bits;
  if (what == "float to fp16") return rf::from_float<rf::fp16>(rf::float_of(bits)).bits;
  if (what == "float to tf32") return rf::tf32_bits(bits);
  if (what == "reciprocal_sqrt") return rf::bits_of(rf::reciprocal_sqrt(rf::float_of(bits)));
  STD_TORCH_CHECK(false, "what: there is no conversion ", what);
}

// Each of the 32-bit patterns, or of 16 bits in the lower half.
void convert(StableIValue* stack, uint64_t, uint64_t) {
  rf::Arguments arguments(stack);
  const std::string what = arguments.text();
  const Tensor bits = arguments.tensor();
  const Tensor out = like({bits.numel()}, bits);
  for (int64_t i = 0; i < bits.numel(); ++i) {
    pointer<int32_t>(out)[i] = static_cast<int32_t>(converted(what, static_cast<uint32_t>(pointer<int32_t>(bits)[i])));
  }
  rf::give(stack, out);
}

void fused_multiply_add(StableIValue* stack, uint64_t, uint64_t) {
  rf::Arguments arguments(stack);
  const Tensor a = arguments.tensor(), b = arguments.tensor(), c = arguments.tensor();
  const Tensor out = like({a.numel()}, a);
  for (int64_t i = 0; i < a.numel(); ++i) {
    pointer<float>(out)[i] = rf::fused_multiply_add(pointer<float>(a)[i], pointer<float>(b)[i], pointer<float>(c)[i]);
  }
  rf::give(stack, out);
}

}  // namespace

}  // namespace simt

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_host, m) {
  m.def("mma(Tensor d, Tensor a, Tensor b, str element) -> Tensor");
  m.def("load_matrix(Tensor memory, Tensor rows, int count, bool transposed) -> Tensor");
  m.def("convert(str what, Tensor bits) -> Tensor");
  m.def("fused_multiply_add(Tensor a, Tensor b, Tensor c) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_host, CPU, m) {
  m.impl("mma", &simt::mma);
  m.impl("load_matrix", &simt::load_matrix);
  m.impl("convert", &simt::convert);
  m.impl("fused_multiply_add", &simt::fused_multiply_add);
}
