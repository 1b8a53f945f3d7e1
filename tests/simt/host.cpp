// The device under the bindings, and the ops by which a test sets it: resnet_fused_host::….
#include "host.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "common/device.h"
#include "common/torch.h"
#include "conv_bn_act/plan.h"

namespace simt {

namespace {

int images = 0;  // that this call has allocated

}  // namespace

Device& device() {
  static Device device;
  return device;
}

namespace {

void set(StableIValue* stack, uint64_t, uint64_t) {
  rf::Arguments arguments(stack);
  const auto number = [&] { return arguments.read<int64_t>(); };
  set_seed(static_cast<uint64_t>(number()));
  device().multiprocessors = static_cast<int>(number());
  device().shared_block = static_cast<int>(number());
  device().shared_multiprocessor = static_cast<int>(number());
  device().shifted = number();
  images = 0;
  banks() = Banks{};
}

void flush(StableIValue*, uint64_t, uint64_t) { std::fflush(stdout); }

void list_kernels(StableIValue*, uint64_t, uint64_t) {
  for (const auto& kernel : rf::conv::detail::kKernels) {
    std::printf("%s %d %d %d %d %d\n", kernel.name, kernel.bm, kernel.bn, kernel.step, kernel.copy, kernel.threads);
  }
}

void planted(StableIValue* stack, uint64_t, uint64_t) { run_planted(rf::Arguments(stack).text().c_str()); }

// A tensor of four dimensions that begins `shift` elements behind what the allocator gave; it ends where its memory ends.
AOTITorchError shifted_image(decltype(&aoti_torch_empty_strided) real, int64_t shift, const int64_t* sizes,
                             const int64_t* strides, int32_t dtype, int32_t type, int32_t index,
                             AtenTensorHandle* out) {
  int64_t extent = 1 + shift;
  for (int i = 0; i < 4; ++i) extent += (sizes[i] - 1) * strides[i];
  const int64_t one = 1;
  AtenTensorHandle base = nullptr;
  AOTITorchError error = real(1, &extent, &one, dtype, type, index, &base);
  if (error != AOTI_TORCH_SUCCESS) return error;
  const rf::Tensor whole(base);
  void* data = whole.data_ptr();
  std::memset(data, 0xff, static_cast<size_t>(extent) * whole.element_size());
  return aoti_torch__reinterpret_tensor(base, 4, sizes, strides, shift, out);
}

}  // namespace

}  // namespace simt

namespace rf {

int multiprocessors(int) { return simt::device().multiprocessors; }
int capability(int) { return 90; }
int shared_per_block(int) { return simt::device().shared_block; }
int shared_per_multiprocessor(int) { return simt::device().shared_multiprocessor; }

}  // namespace rf

// What libtorch answers for a CUDA device, found here first (-Bsymbolic).
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(&simt::device());
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

// Memory of NaN, so that what a kernel does not write shows.
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t type, int32_t index, AtenTensorHandle* out) {
  static const auto real = reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(RTLD_NEXT, __func__));
  if (type != aoti_torch_device_type_cpu()) return real(dims, sizes, strides, dtype, type, index, out);
  if (dims == 4) {
    const int64_t shift = simt::device().shifted >> simt::images++ & 1;
    if (sizes[0] * sizes[1] * sizes[2] * sizes[3] > 0) {
      return simt::shifted_image(real, shift, sizes, strides, dtype, type, index, out);
    }
  }
  const AOTITorchError error = real(dims, sizes, strides, dtype, type, index, out);
  if (error == AOTI_TORCH_SUCCESS && dims == 1) {
    void* data = nullptr;
    int64_t bytes = 0;
    aoti_torch_get_data_ptr(*out, &data);
    aoti_torch_get_storage_size(*out, &bytes);
    std::memset(data, 0xff, static_cast<size_t>(bytes));
  }
  return error;
}

}  // extern "C"

STABLE_TORCH_LIBRARY(resnet_fused_host, m) {
  m.def("set(int seed, int multiprocessors, int shared_block, int shared_multiprocessor, int shifted) -> ()");
  m.def("flush() -> ()");
  m.def("list_kernels() -> ()");
  m.def("planted(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_host, CompositeExplicitAutograd, m) {
  m.impl("set", &simt::set);
  m.impl("flush", &simt::flush);
  m.impl("list_kernels", &simt::list_kernels);
  m.impl("planted", &simt::planted);
}
