// The Python module _C: what the compiled library is and holds, and what no tensor op tells.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>

#include "conv_bn_act/plan.h"

namespace py = pybind11;

// libresnet_fused.so looks for this symbol as it is loaded: see library.cpp.
extern "C" __attribute__((visibility("default"))) const int resnet_fused_python_registers_ops = 1;

namespace {

struct Resources {
  const char* symbol;
  const char* architecture;
  int registers, stack, spill, shared;
};
#include "build_info.h"
#include "resources.h"

py::dict build_info() {
  py::dict info;
  for (const auto& [key, value] : kBuildInfo) info[key] = value;
  return info;
}

py::list kernel_resources() {
  py::list rows;
  for (const Resources& row : kResources) {
    py::dict entry;
    entry["symbol"] = row.symbol;
    entry["architecture"] = row.architecture;
    entry["registers"] = row.registers;
    entry["stack"] = row.stack;
    entry["spill"] = row.spill;
    entry["shared"] = row.shared;
    rows.append(entry);
  }
  return rows;
}

// Template arguments as they stand in a symbol, and the launch.
py::list conv_bn_act_kernels() {
  py::list rows;
#define RF_CONV_ROW(name, element, math, bm, bn, row_bytes, grid_m, grid_n, stages, copy)                            \
  {                                                                                                                  \
    const auto& kernel = rf::conv::info(rf::conv::Kernel::k_##name);                                                 \
    py::dict row;                                                                                                    \
    row["name"] = #name;                                                                                             \
    row["element"] = #element;                                                                                       \
    row["math"] = #math;                                                                                             \
    row["copy"] = copy;                                                                                              \
    row["template"] = std::array<int, 7>{bm, bn, row_bytes, grid_m, grid_n, stages, copy};                           \
    row["threads"] = kernel.threads;                                                                                 \
    row["shared"] = kernel.shared_bytes;                                                                             \
    rows.append(row);                                                                                                \
  }
  RF_CONV_KERNELS(RF_CONV_ROW)
#undef RF_CONV_ROW
  return rows;
}

using Sizes = std::array<int64_t, 4>;
using Pair = std::array<int64_t, 2>;

// Why no CUDA kernel may be given a problem of these sizes, or None.
std::optional<std::string> conv_bn_act_refusal(const Sizes& x, const Sizes& weight, const Pair& stride,
                                               const Pair& padding, const Pair& dilation, int64_t groups,
                                               int element_bytes) {
  rf::conv::Args args{};
  const char* reason = rf::conv::set_sizes(args, x.data(), weight.data(), stride.data(), padding.data(),
                                           dilation.data(), groups);
  alignas(16) static char somewhere[16];  // tensors are never null and never misaligned to their element
  args.x = args.weight = args.mean = args.var = args.out = somewhere;
  const auto element = element_bytes == 4 ? rf::conv::Element::kFP32 : rf::conv::Element::kBF16;
  if (!reason) reason = rf::conv::refusal(args, element);
  return reason ? std::optional<std::string>(reason) : std::nullopt;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("kernel_resources", &kernel_resources);
  m.def("conv_bn_act_kernels", &conv_bn_act_kernels);
  m.def("conv_bn_act_refusal", &conv_bn_act_refusal);
}
