// resnet_fused_cpu::winograd: checks, shares the tiles out among torch's threads, runs this CPU's kernel; and
// resnet_fused_cpu::winograd_filters: what it wants of the weight.
#include "conv_bn_act/winograd.h"

#include <algorithm>
#include <atomic>

#include "common/torch.h"

namespace rf::winograd {

namespace {

// Tiles that a thread takes at a time: with 256 channels their transforms fill half a megabyte.
constexpr int64_t kTiles = 28;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Run* kernel(const std::string& isa) {
#ifdef __x86_64__
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if ((isa.empty() || isa == "avx512") && fma && __builtin_cpu_supports("avx512f")) return &avx512::run;
  if ((isa.empty() || isa == "avx2") && fma) return &avx2::run;
#endif
  return nullptr;
}

bool is_channels_last(const Tensor& t) {
  const int64_t c = t.size(1), w = t.size(3) * c;
  return t.stride(1) == 1 && (t.size(3) < 2 || t.stride(3) == c) && (t.size(2) < 2 || t.stride(2) == w) &&
         (t.size(0) < 2 || t.stride(0) == t.size(2) * w);
}

void check(const Tensor& t, const char* name, int64_t dimensions) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == dimensions, name, ": got ",
                  shape_text(t), ", need float32 on the CPU with ", dimensions, " dimensions");
  STD_TORCH_CHECK(dimensions == 4 ? is_channels_last(t) : t.is_contiguous(), name, ": its elements are not adjacent");
}

bool winograd(const Tensor& x, const Tensor& filters, const Tensor& bias, const OptionalTensor& residual, Pair padding,
              bool relu, const Tensor& out, const std::string& isa) {
  Run* const run = kernel(isa);
  STD_TORCH_CHECK(run, "winograd: this CPU lacks ", isa.empty() ? "AVX2" : isa);
  check(x, "x", 4);
  check(out, "out", 4);
  const int64_t channels = x.size(1), out_channels = out.size(1);
  STD_TORCH_CHECK(channels % 16 == 0 && out_channels % kPanel == 0, "x: need channels in 16s, out: in 32s");
  STD_TORCH_CHECK(filters.is_cpu() && filters.scalar_type() == ScalarType::Float && filters.is_contiguous() &&
                      filters.numel() == 16 * channels * out_channels,
                  "filters: got ", shape_text(filters), ", need [K/32, 16, C, 32]");
  check(bias, "bias", 1);
  STD_TORCH_CHECK(bias.numel() == out_channels, "bias: got ", shape_text(bias));
  STD_TORCH_CHECK(padding[0] >= 0 && padding[1] >= 0 && out.size(0) == x.size(0) &&
                      out.size(2) == x.size(2) + 2 * padding[0] - 2 && out.size(3) == x.size(3) + 2 * padding[1] - 2,
                  "out: got ", shape_text(out));
  if (residual) {
    check(*residual, "residual", 4);
    for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(residual->size(d) == out.size(d), "residual: got ", shape_text(*residual));
  }
  const auto floats = [](const Tensor& t) { return static_cast<const float*>(t.data_ptr()); };
  const Problem problem{floats(x), floats(filters), floats(bias), residual ? floats(*residual) : nullptr,
                        static_cast<float*>(out.data_ptr()), x.size(0), x.size(2), x.size(3), channels, out.size(2),
                        out.size(3), out_channels, padding[0], padding[1], relu};

  const int64_t tiles = out.size(0) * divide_up(out.size(2), 2) * divide_up(out.size(3), 2);
  const int64_t panels = out_channels / kPanel, threads = torch::stable::get_num_threads();
  if (tiles == 0) return true;
  // As many blocks for every thread, of about one size; too few of them, and the output channels are shared out too.
  int64_t blocks = divide_up(tiles, kTiles);
  if (blocks >= threads) blocks = divide_up(blocks, threads) * threads;
  const int64_t block = divide_up(tiles, std::min(blocks, tiles));
  blocks = divide_up(tiles, block);
  const int64_t shares = std::min(panels, std::max<int64_t>(1, threads / blocks));
  const int64_t share = divide_up(panels, shares);

  const int64_t room = divide_up(buffer_floats(block, channels), 16) * 16;
  const Tensor buffers = torch::stable::empty({room * threads}, ScalarType::Float);
  std::atomic<bool> finite = true;
  torch::stable::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    uint32_t thread = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
    float* const buffer = static_cast<float*>(buffers.data_ptr()) + room * thread;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / shares * block, panel = item % shares * share;
      const int64_t count = std::min(share, panels - panel);
      if (count > 0 && !run(problem, first, std::min(block, tiles - first), panel, count, buffer)) finite = false;
    }
  });
  return finite;
}

// [K/32, 16, C, 32] from [K, C, 3, 3]: G·(scale[k]·g)·Gᵀ in float64, rounded once.
Tensor transform_filters(const Tensor& weight, const Tensor& scale) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Float && weight.dim() == 4 &&
                      weight.size(2) == 3 && weight.size(3) == 3 && weight.size(0) % kPanel == 0,
                  "weight: got ", shape_text(weight), ", need float32 [K, C, 3, 3] with K in 32s");
  STD_TORCH_CHECK(scale.is_cpu() && scale.scalar_type() == ScalarType::Double && scale.dim() == 1 &&
                      scale.is_contiguous() && scale.numel() == weight.size(0),
                  "scale: got ", shape_text(scale), ", need float64 [K]");
  const int64_t channels = weight.size(1), panels = weight.size(0) / kPanel;
  const Tensor filters = torch::stable::empty({panels, 16, channels, kPanel}, ScalarType::Float);
  const float* const from = static_cast<const float*>(weight.data_ptr());
  const double* const factor = static_cast<const double*>(scale.data_ptr());
  float* const to = static_cast<float*>(filters.data_ptr());
  const std::array<int64_t, 4> stride{weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  torch::stable::parallel_for(0, panels * channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / channels, c = item % channels;
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        const int64_t k = panel * kPanel + lane;
        double t[4][3];
        for (int64_t j = 0; j < 3; ++j) {
          double g[3];
          for (int64_t i = 0; i < 3; ++i) {
            g[i] = from[k * stride[0] + c * stride[1] + i * stride[2] + j * stride[3]] * factor[k];
          }
          t[0][j] = g[0], t[3][j] = g[2];
          t[1][j] = 0.5 * (g[0] + g[1] + g[2]), t[2][j] = 0.5 * (g[0] - g[1] + g[2]);
        }
        for (int64_t i = 0; i < 4; ++i) {
          const double u[4] = {t[i][0], 0.5 * (t[i][0] + t[i][1] + t[i][2]), 0.5 * (t[i][0] - t[i][1] + t[i][2]),
                               t[i][2]};
          for (int64_t j = 0; j < 4; ++j) {
            to[((panel * 16 + 4 * i + j) * channels + c) * kPanel + lane] = static_cast<float>(u[j]);
          }
        }
      }
    }
  });
  return filters;
}

void boxed_filters(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor weight = arguments.tensor(), scale = arguments.tensor();
  give(stack, transform_filters(weight, scale));
}

void boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor(), filters = arguments.tensor(), bias = arguments.tensor();
  const OptionalTensor residual = arguments.optional_tensor();
  const Pair padding = arguments.pair();
  const bool relu = arguments.read<bool>();
  const Tensor out = arguments.tensor();
  const std::string isa = arguments.text();
  stack[0] = torch::stable::detail::from(winograd(x, filters, bias, residual, padding, relu, out, isa));
}

std::string instructions() { return kernel("avx512") ? "avx512" : kernel("avx2") ? "avx2" : ""; }

void boxed_instructions(StableIValue* stack, uint64_t, uint64_t) { stack[0] = torch::stable::detail::from(instructions()); }

}  // namespace

}  // namespace rf::winograd

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "winograd(Tensor x, Tensor filters, Tensor bias, Tensor? residual, int[2] padding, bool relu, Tensor(a!) out, "
      "str isa='') -> bool");
  m.def("winograd_filters(Tensor weight, Tensor scale) -> Tensor");
  m.def("instructions() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("winograd", &rf::winograd::boxed);
  m.impl("winograd_filters", &rf::winograd::boxed_filters);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  m.impl("instructions", &rf::winograd::boxed_instructions);
}
