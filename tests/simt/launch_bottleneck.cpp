// What the .cu files of bottleneck define on a GPU.
#include <cstdio>

#include "bottleneck/cuda.h"
#include "bottleneck/launch.cuh"
#include "host.h"

namespace rf::bottleneck {

template <class T, Element E>
static void launch_part(const Plan& plan) {
  const KernelInfo& kernel = info(plan.kernel);
  std::printf("kernel %s grid %u tiles %d\n", kernel.name, plan.grid, plan.args.tiles);
  const auto side = [&](int size) { return static_cast<size_t>((size - 1) / kernel.stride + 1); };
  const size_t pixels = plan.args.n * side(plan.args.h) * side(plan.args.w);
  simt::write_once(plan.args.out, pixels * 4 * kernel.mid * sizeof(T));
  run_part<T, E>(plan, simt::HostLauncher{});
  simt::write_once(nullptr, 0);
  simt::banks().print();
}

void launch_bf16(const Plan& plan, void*) { launch_part<bf16, Element::kBF16>(plan); }
void launch_fp16(const Plan& plan, void*) { launch_part<fp16, Element::kFP16>(plan); }

}  // namespace rf::bottleneck
