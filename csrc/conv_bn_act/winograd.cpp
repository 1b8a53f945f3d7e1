#include "conv_bn_act/winograd.h"

#include <algorithm>
#include <atomic>

#include "common/torch.h"
#include "conv_bn_act/balance.h"
#include "conv_bn_act/instructions.h"

namespace rf::winograd {

using cpu::divide_up;

namespace {

// Tiles that a thread takes at a time: with 256 channels their transforms fill half a megabyte.
constexpr int64_t kTiles = 28;

}  // namespace

const Kernel* kernel(bool bf16, const std::string& isa) {
#ifdef __x86_64__
  return cpu::version<const Kernel>(cpu::instructions(bf16, isa), &avx512bf16::kernel, &avx512::kernel, &avx2::kernel);
#else
  return nullptr;
#endif
}

bool convolve(const Problem& problem, bool bf16, const Kernel& kernel) {
  const int64_t tiles = problem.images * divide_up(problem.out_height, 2) * divide_up(problem.out_width, 2);
  const int64_t panels = problem.out_channels / kPanel, threads = torch::stable::get_num_threads();
  if (tiles == 0 || panels == 0) return true;
  if (!balanced(problem, bf16, kernel.energies)) return false;
  // As many blocks for every thread, of about one size; too few of them, and the output channels are shared out too.
  int64_t blocks = divide_up(tiles, kTiles);
  if (blocks >= threads) blocks = divide_up(blocks, threads) * threads;
  const int64_t block = divide_up(tiles, std::min(blocks, tiles));
  blocks = divide_up(tiles, block);
  const int64_t shares = std::min(panels, std::max<int64_t>(1, threads / blocks));
  const int64_t share = divide_up(panels, shares);

  const int64_t room = divide_up(buffer_floats(block, problem.channels / (bf16 ? 2 : 1)), 16) * 16;
  const Tensor buffers = torch::stable::empty({room * threads}, ScalarType::Float);
  std::atomic<bool> finite = true;
  torch::stable::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    uint32_t thread = 0;
    check(torch_get_thread_idx(&thread), "get_thread_idx");
    float* const buffer = static_cast<float*>(buffers.data_ptr()) + room * thread;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / shares * block, panel = item % shares * share;
      const int64_t count = std::min(share, panels - panel);
      if (count > 0 && !kernel.run(problem, first, std::min(block, tiles - first), panel, count, buffer)) finite = false;
    }
  });
  return finite;
}

}  // namespace rf::winograd
