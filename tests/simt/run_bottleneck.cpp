#include <cstdio>

#include "bottleneck/launch.cuh"
#include "request.h"
#include "run.h"

namespace simt {

namespace {

rf::bottleneck::Conv conv_of(Request& request, const std::string& name) {
  rf::bottleneck::Conv conv{};
  conv.weight = request.buffer(name + "_weight");
  if (!conv.weight) return conv;
  conv.bias = request.buffer(name + "_bias");
  conv.gamma = request.buffer(name + "_gamma");
  conv.beta = request.buffer(name + "_beta");
  conv.mean = request.buffer(name + "_mean");
  conv.var = request.buffer(name + "_var");
  conv.eps = static_cast<float>(request.real(name + "_eps"));
  conv.wide = static_cast<unsigned>(request.integer(name + "_wide"));
  return conv;
}

}  // namespace

void run_bottleneck(Request& request) {
  using namespace rf::bottleneck;
  const auto number = [&](const char* key) { return static_cast<int>(request.integer(key)); };
  Args args{};
  args.x = request.buffer("x");
  args.conv1 = conv_of(request, "conv1");
  args.conv2 = conv_of(request, "conv2");
  args.conv3 = conv_of(request, "conv3");
  args.shortcut = conv_of(request, "shortcut");
  args.n = number("n");
  args.h = number("h"), args.w = number("w");
  args.x_stride_n = request.integer("x_stride_n");
  args.x_stride_h = request.integer("x_stride_h");
  args.x_stride_w = request.integer("x_stride_w");
  args.out = request.output("out", static_cast<size_t>(request.integer("out_bytes")));

  const Element element = request.text("dtype") == "bf16" ? Element::kBF16 : Element::kFP16;
  const Shape shape{element, number("cin"), number("mid"), number("cout"), number("stride"), args.shortcut.weight != nullptr};
  const Limits limits{number("multiprocessors"), number("shared_block"), number("shared_multiprocessor")};
  const Kernel choice = kernel_named(request.text("kernel").c_str());
  const Plan plan = make_plan(args, shape, limits, choice);
  if (plan.refusal) {
    std::printf("refused: %s\n", plan.refusal);
    return;
  }
  std::printf("kernel %s grid %u tiles %d\n", info(plan.kernel).name, plan.grid, plan.args.tiles);
  write_once(args.out, static_cast<size_t>(request.integer("out_bytes")));
  if (element == Element::kBF16) {
    run_part<rf::bf16, Element::kBF16>(plan, HostLauncher{});
  } else {
    run_part<rf::fp16, Element::kFP16>(plan, HostLauncher{});
  }
  banks().print();
  request.save("out");
}

}  // namespace simt
