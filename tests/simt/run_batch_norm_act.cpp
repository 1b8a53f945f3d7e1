#include <cstdio>

#include "batch_norm_act/launch.cuh"
#include "request.h"
#include "run.h"

namespace simt {

void run_batch_norm_act(Request& request) {
  using namespace rf::norm;
  const Shape shape{request.integer("n"), request.integer("c"), request.integer("h"), request.integer("w"),
                    request.integer("channels_last") != 0};
  const std::string dtype = request.text("dtype"), op = request.text("op");
  const Element element = dtype == "fp32" ? Element::kFP32 : dtype == "fp16" ? Element::kFP16 : Element::kBF16;
  const Operation operation = op == "forward" ? Operation::kForward
                              : op == "apply" ? Operation::kApply
                                              : Operation::kBackward;
  const auto count = static_cast<size_t>(shape.n * shape.c * shape.h * shape.w);
  const auto vector = static_cast<size_t>(shape.c) * sizeof(float);
  std::vector<std::string> written;
  const auto output = [&](const char* name, size_t bytes) {
    written.push_back(name);
    return request.output(name, bytes);
  };
  const auto image = [&](const char* name) { return output(name, count * element_bytes(element)); };
  const auto floats = [&](const char* name) { return static_cast<float*>(output(name, vector)); };

  Args args{};
  args.x = request.buffer("x");
  args.gamma = request.buffer("gamma");
  args.beta = request.buffer("beta");
  args.eps = static_cast<float>(request.real("eps"));
  args.wide = static_cast<unsigned>(request.integer("wide"));
  args.training = request.integer("training") != 0;
  args.relu = request.integer("relu") != 0;
  if (operation == Operation::kForward) {
    args.running_mean = request.buffer("running_mean");
    args.running_var = request.buffer("running_var");
    if (args.running_mean) written.insert(written.end(), {"running_mean", "running_var"});
    args.batches = static_cast<const int64_t*>(request.buffer("batches"));
    args.momentum = static_cast<float>(request.real("momentum"));
    args.batch_mean = floats("mean");
    args.batch_scale = floats("scale");
  } else {
    args.mean = request.buffer("mean");
    args.scale = request.buffer("scale");
  }
  if (operation == Operation::kBackward) {
    args.grad = request.buffer("grad");
    args.output = request.buffer("output");
    args.dgamma = floats("dgamma");
    args.dbeta = floats("dbeta");
    if (request.integer("need_x")) args.dx = image("dx");
    if (request.integer("need_residual")) args.dresidual = image("dresidual");
  } else {
    args.residual = request.buffer("residual");
    args.out = image("out");
  }

  Plan plan = make_plan(args, shape, element, operation, static_cast<int>(request.integer("multiprocessors")));
  if (plan.refusal) {
    std::printf("refused: %s\n", plan.refusal);
    return;
  }
  const Walk& walk = plan.args.walk;
  std::printf("%s %s lanes %d chunks %d splits %d\n", plan.channels_last ? "channels_last" : "nchw",
              plan.vectors ? "vectors" : "elements", 1 << walk.lanes_log2, walk.chunks, walk.splits);
  plan.args.partial = static_cast<float*>(request.output("partial", plan.workspace_bytes));
  if (element == Element::kBF16) run<rf::bf16>(plan, operation, HostLauncher{});
  if (element == Element::kFP16) run<rf::fp16>(plan, operation, HostLauncher{});
  if (element == Element::kFP32) run<float>(plan, operation, HostLauncher{});
  banks().print();
  for (const std::string& name : written) request.save(name);
}

}  // namespace simt
