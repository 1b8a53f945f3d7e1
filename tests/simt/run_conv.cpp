#include <cstdio>
#include <cstring>

#include "conv_bn_act/launch.cuh"
#include "request.h"
#include "run.h"

namespace simt {

namespace {

rf::conv::Element element_of(const std::string& dtype) {
  if (dtype == "bf16") return rf::conv::Element::kBF16;
  return dtype == "fp16" ? rf::conv::Element::kFP16 : rf::conv::Element::kFP32;
}

rf::conv::Choice choice_of(const Request& request) {
  rf::conv::Choice choice;
  choice.splits = static_cast<int>(request.integer("splits"));
  const std::string name = request.text("kernel");
  for (int i = 0; i < rf::conv::kKernelCount && !name.empty(); ++i) {
    if (name == rf::conv::detail::kKernels[i].name) choice.kernel = static_cast<rf::conv::Kernel>(i);
  }
  if (!name.empty() && choice.kernel == rf::conv::Kernel::kCount) fail("no kernel %s", name.c_str());
  return choice;
}

}  // namespace

void list_conv_kernels() {
  for (const auto& kernel : rf::conv::detail::kKernels) {
    std::printf("%s %d %d %d %d %d\n", kernel.name, kernel.bm, kernel.bn, kernel.step, kernel.copy, kernel.threads);
  }
}

void run_conv(Request& request) {
  const auto number = [&](const char* key) { return static_cast<int>(request.integer(key)); };
  const rf::conv::Element element = element_of(request.text("dtype"));
  rf::conv::Args args{};
  args.x = request.buffer("x");
  args.weight = request.buffer("weight");
  args.bias = request.buffer("bias");
  args.gamma = request.buffer("gamma");
  args.beta = request.buffer("beta");
  args.mean = request.buffer("mean");
  args.var = request.buffer("var");
  args.residual = request.buffer("residual");
  args.n = request.integer("n");
  args.h = number("h"), args.w = number("w"), args.c = number("c"), args.k = number("k");
  args.r = number("r"), args.s = number("s"), args.p = number("p"), args.q = number("q");
  args.stride_h = number("stride_h"), args.stride_w = number("stride_w");
  args.pad_h = number("pad_h"), args.pad_w = number("pad_w");
  args.dilation_h = number("dilation_h"), args.dilation_w = number("dilation_w");
  args.groups = number("groups");
  args.x_stride_n = request.integer("x_stride_n");
  args.x_stride_h = request.integer("x_stride_h");
  args.x_stride_w = request.integer("x_stride_w");
  args.residual_stride = request.integer("residual_stride");
  args.out_stride = request.integer("out_stride");
  args.eps = static_cast<float>(request.real("eps"));
  args.wide = static_cast<unsigned>(request.integer("wide"));
  args.relu = request.integer("relu") != 0;
  const auto pixels = static_cast<size_t>(args.n * args.p * args.q);
  args.out = request.output("out", ((pixels - 1) * args.out_stride + args.k) * element_bytes(element));

  const auto precision =
      request.text("precision") == "ieee" ? rf::conv::Precision::kIeee : rf::conv::Precision::kTensorCore;
  rf::conv::Plan plan = rf::conv::make_plan(args, element, precision, number("multiprocessors"), choice_of(request));
  if (plan.refusal) {
    std::printf("refused: %s\n", plan.refusal);
    return;
  }
  plan.args.workspace = static_cast<float*>(request.output("workspace", plan.workspace_bytes));
  std::printf("kernel %s grid %u %u splits %d vector_out %d\n", rf::conv::info(plan.kernel).name, plan.grid_x,
              plan.grid_z, plan.args.splits, plan.args.vector_out);
  rf::conv::run(plan, HostLauncher{});
  banks().print();
  request.save("out");
}

}  // namespace simt
