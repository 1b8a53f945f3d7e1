// The Python module _C: what the compiled library is and holds, and what no tensor op tells.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "bottleneck/plan.h"
#include "common/unchanged.h"
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
#define RF_CONV_ROW(name, element, math, bm, bn, row_bytes, grid_m, grid_n, stages, copy, blocks)                    \
  {                                                                                                                  \
    const auto& kernel = rf::conv::info(rf::conv::Kernel::k_##name);                                                 \
    py::dict row;                                                                                                    \
    row["name"] = #name;                                                                                             \
    row["element"] = #element;                                                                                       \
    row["math"] = #math;                                                                                             \
    row["copy"] = copy;                                                                                              \
    row["blocks"] = blocks;                                                                                          \
    row["template"] = std::array<int, 8>{bm, bn, row_bytes, grid_m, grid_n, stages, copy, blocks};                   \
    row["threads"] = kernel.threads;                                                                                 \
    row["shared"] = kernel.shared_bytes;                                                                             \
    rows.append(row);                                                                                                \
  }
  RF_CONV_KERNELS(RF_CONV_ROW)
#undef RF_CONV_ROW
  return rows;
}

bool unchanged(const py::tuple& holders, const py::tuple& keys, const py::tuple& values, const py::tuple& modules,
               const py::tuple& types, const py::tuple& entries, const py::tuple& names, const py::tuple& empty,
               const py::tuple& sized, const py::tuple& sizes) {
  const size_t slots = holders.size(), count = modules.size();
  if (keys.size() != slots || values.size() != slots) throw py::value_error("holders, keys, values: of different lengths");
  if (types.size() != count || entries.size() != count || names.size() != count) {
    throw py::value_error("modules, types, entries, names: of different lengths");
  }
  if (sizes.size() != sized.size()) throw py::value_error("sized, sizes: of different lengths");
  for (const py::handle& tuple : names) {
    if (!PyTuple_Check(tuple.ptr())) throw py::type_error("names: need tuples");
  }
  return rf::Unchanged{holders.ptr(), keys.ptr(),  values.ptr(), modules.ptr(), types.ptr(),
                       entries.ptr(), names.ptr(), empty.ptr(),  sized.ptr(),   sizes.ptr()}();
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

// The constants of csrc/bottleneck/tile.h, one row for each kernel.
py::list bottleneck_kernels() {
  py::list rows;
  for (const rf::bottleneck::KernelInfo& kernel : rf::bottleneck::detail::kKernels) {
    py::dict row;
    row["name"] = kernel.name;
    row["element"] = kernel.element == rf::bottleneck::Element::kBF16 ? "bf16" : "fp16";
    row["mid"] = kernel.mid;
    row["cin"] = kernel.cin;
    row["stride"] = kernel.stride;
    row["project"] = kernel.project;
    row["resident"] = kernel.resident;
    row["tile"] = std::array<int, 2>{kernel.tile_h, kernel.tile_w};
    row["halo"] = std::array<int, 2>{kernel.halo_h, kernel.halo_w};
    row["rows"] = kernel.rows;
    row["pass_rows"] = kernel.pass_rows;
    row["passes"] = kernel.passes;
    row["steps"] = kernel.steps;
    row["chunk_bytes"] = kernel.chunk_bytes;
    row["threads"] = rf::bottleneck::kThreads;
    row["products"] = kernel.products;
    row["fragments"] = kernel.fragments;
    row["regions"] = kernel.regions;
    row["shared"] = kernel.shared_bytes;
    row["blocks"] = kernel.blocks;
    row["template"] = kernel.parameters;
    rows.append(row);
  }
  return rows;
}

using ConvSizes = std::tuple<Sizes, Pair, Pair, Pair, int64_t>;  // weight, stride, padding, dilation, groups

// The kernel that computes a bottleneck of these sizes on a device of so many multiprocessors whose blocks may have this
// much shared memory, and None; or "" and the reason why there is none.
std::pair<std::string, std::optional<std::string>> bottleneck_choice(const Sizes& x,
                                                                     const std::array<ConvSizes, 3>& convs,
                                                                     const std::optional<ConvSizes>& shortcut,
                                                                     bool bf16, int shared_limit, int multiprocessors) {
  using namespace rf::bottleneck;
  const auto read = [](const ConvSizes& conv) { return std::make_from_tuple<ConvShape>(conv); };
  const ConvShape shapes[3] = {read(convs[0]), read(convs[1]), read(convs[2])};
  const ConvShape projection = shortcut ? read(*shortcut) : ConvShape{};
  Shape shape{bf16 ? Element::kBF16 : Element::kFP16, 0, 0, 0, 0, false};
  const char* reason = read_shape(shape, x[1], shapes, shortcut ? &projection : nullptr);
  const rf::bottleneck::Sizes sizes{x[0], x[2], x[3]};
  if (!reason) reason = sizes_refusal(sizes);
  if (reason) return {"", reason};
  const Kernel kernel = kernel_for(shape, sizes, {multiprocessors, shared_limit, shared_limit}, &reason);
  if (kernel == Kernel::kCount) return {"", reason};
  return {info(kernel).name, std::nullopt};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("unchanged", &unchanged);
  m.def("build_info", &build_info);
  m.def("kernel_resources", &kernel_resources);
  m.def("conv_bn_act_kernels", &conv_bn_act_kernels);
  m.def("conv_bn_act_refusal", &conv_bn_act_refusal);
  m.def("bottleneck_kernels", &bottleneck_kernels);
  m.def("bottleneck_choice", &bottleneck_choice);
}
