#include "conv_bn_act/direct.h"

#include <algorithm>
#include <atomic>

#include "common/torch.h"
#include "conv_bn_act/instructions.h"

namespace rf::direct {

using cpu::divide_up;

namespace {

// Pixels that a thread takes at a time: what the kernel multiplies at once; more where the filters take a good
// part of the second-level cache: they then pass by more rarely.
constexpr int64_t kPixels = 14;
constexpr int64_t kLargeFilters = 256 << 10;  // bytes

}  // namespace

Run* kernel(bool bf16, const std::string& isa) {
#ifdef __x86_64__
  return cpu::version<Run>(cpu::instructions(bf16, isa), &avx512bf16::run, &avx512::run, &avx2::run);
#else
  return nullptr;
#endif
}

bool convolve(const Problem& problem, bool bf16, Run* run) {
  const int64_t pixels = problem.pixels(), panels = problem.out_channels / kPanel;
  if (pixels == 0 || panels == 0) return true;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t element = bf16 ? 2 : 4;
  const int64_t filters = problem.depth() * problem.out_channels * element;
  const int64_t image = problem.images * problem.height * problem.width * problem.channels * element;
  // Filters larger than the images are shared out, each thread reading its part once; else the pixels are.
  int64_t shares = filters > image ? std::min(panels, threads) : 1;
  // Filters that are not packed are brought into order for every block of pixels.
  const int64_t most = problem.order != Order::kPacked           ? kMostPixels
                       : filters / shares > kLargeFilters ? kMostPixels / 2
                                                          : kPixels;
  int64_t blocks = divide_up(pixels, most);
  if (shares == 1) {
    blocks = std::min(pixels, divide_up(blocks, threads) * threads);
    if (pixels < threads * kPixels / 2) shares = std::min(panels, divide_up(threads, blocks));
  }
  const int64_t block = divide_up(pixels, blocks), share = divide_up(panels, shares);
  blocks = divide_up(pixels, block);

  const int64_t room = divide_up(buffer_floats(block, share), 16) * 16;
  const Tensor buffers = torch::stable::empty({room * threads}, ScalarType::Float);
  std::atomic<bool> finite = true;
  torch::stable::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    uint32_t thread = 0;
    check(torch_get_thread_idx(&thread), "get_thread_idx");
    float* const buffer = static_cast<float*>(buffers.data_ptr()) + room * thread;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t pixel = item % blocks * block, panel = item / blocks * share;
      const int64_t count = std::min(share, panels - panel);
      if (count > 0 && !run(problem, pixel, std::min(block, pixels - pixel), panel, count, buffer)) finite = false;
    }
  });
  return finite;
}

}  // namespace rf::direct
