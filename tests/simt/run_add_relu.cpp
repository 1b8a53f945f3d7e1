#include <cstdio>

#include "add_relu/launch.cuh"
#include "request.h"
#include "run.h"

namespace simt {

void run_add_relu(Request& request) {
  const std::vector<int64_t> size = request.integers("size");
  const std::vector<int64_t> stride_a = request.integers("stride_a");
  const std::vector<int64_t> stride_b = request.integers("stride_b");
  const std::vector<int64_t> stride_out = request.integers("stride_out");
  const std::string dtype = request.text("dtype");
  const bool backward = request.text("op") == "backward";
  void* a = request.buffer("a");
  void* b = request.buffer("b");
  const bool in_place = request.integer("in_place") != 0;
  void* out = in_place ? a : request.output("out", static_cast<size_t>(request.integer("out_bytes")));
  const rf::add_relu::Problem problem{a,
                                      b,
                                      out,
                                      dtype == "fp32" ? 4 : 2,
                                      static_cast<int>(size.size()),
                                      size.data(),
                                      stride_a.data(),
                                      stride_b.data(),
                                      stride_out.data()};
  const auto plan = rf::add_relu::make_plan(problem, static_cast<int>(request.integer("multiprocessors")));
  if (plan.refusal) {
    std::printf("refused: %s\n", plan.refusal);
    return;
  }
  std::printf("%s grid %u\n", plan.strided ? "strided" : plan.vectors ? "vectors" : "elements", plan.grid);
  const HostLauncher launcher;
  const auto run = [&](auto element) {
    using T = decltype(element);
    if (backward) return rf::add_relu::run<T, rf::add_relu::ReluBackward>(plan, launcher);
    rf::add_relu::run<T, rf::add_relu::AddRelu>(plan, launcher);
  };
  if (dtype == "bf16") run(rf::bf16{});
  if (dtype == "fp16") run(rf::fp16{});
  if (dtype == "fp32") run(float{});
  request.save(in_place ? "a" : "out");
}

}  // namespace simt
