// A network on the CPU as a list of steps: checked once, then run by one call, a few images at a time.
//
// Steps read and write places: the input, the result, a tensor that is added, and buffers, which hold what lies between
// two steps for the images that are under way and are used again and again.
#include <algorithm>
#include <memory>

#include "conv_bn_act/cpu.h"
#include "conv_bn_act/direct.h"
#include "conv_bn_act/instructions.h"
#include "conv_bn_act/winograd.h"
#include "cpu/pool.h"

namespace rf::cpu {

namespace {

enum Place : size_t { kInput, kResult, kIdentity, kBuffers };  // the first buffer is kBuffers
enum class Kind : int64_t { kConvolution, kMaxPool, kMean };

constexpr int64_t kMagic = 0x6e616c702d6672;  // what a handle begins with

struct Shape {
  int64_t channels, height, width;

  int64_t elements() const { return channels * height * width; }
  bool operator==(const Shape& other) const {
    return channels == other.channels && height == other.height && width == other.width;
  }
};

struct Step {
  Kind kind;
  size_t from, to;
  std::optional<size_t> residual;
  bool relu;
  Method method;
  Pair kernel, stride, padding, dilation;
  Shape in, out;
  std::vector<Tensor> parameters;  // filters, scale, bias, and with Winograd's method the direct sum's filters or none
};

struct Plan {
  int64_t magic = kMagic ^ reinterpret_cast<intptr_t>(this);  // a copy of it is none
  bool bf16;
  bool identity = false;  // whether a tensor to add belongs to the call
  bool pooled = false;    // whether the result is [N, C]
  int64_t images;         // under way at a time
  Shape in, out;
  std::vector<int64_t> buffers;  // bytes of one image
  std::vector<Step> steps;

  int64_t element() const { return bf16 ? 2 : 4; }
};

// The integers of a description, one after the other.
class Integers {
 public:
  explicit Integers(const std::vector<int64_t>& values) : values_(values) {}

  int64_t next(int64_t least, int64_t most = int64_t{1} << 40) {
    STD_TORCH_CHECK(at_ < values_.size(), "description: it ends too soon");
    const int64_t value = values_[at_++];
    STD_TORCH_CHECK(value >= least && value <= most, "description: got ", value, " at ", at_ - 1, ", need ", least, " to ",
                    most);
    return value;
  }
  Pair pair(int64_t least) {
    const int64_t first = next(least);
    return {first, next(least)};
  }
  bool done() const { return at_ == values_.size(); }

 private:
  const std::vector<int64_t>& values_;
  size_t at_ = 0;
};

void check_parameter(const Tensor& t, const char* name, bool bf16, int64_t elements) {
  const ScalarType dtype = bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && t.numel() == elements, name, ": got ",
                  shape_text(t), ", need ", elements, " adjacent elements of the right dtype on the CPU");
}

void check_convolution(const Step& step, bool bf16) {
  const int64_t channels = step.in.channels, out_channels = step.out.channels;
  const int64_t depth = step.kernel[0] * step.kernel[1] * channels;
  const int64_t direct = (bf16 ? (depth + 1) / 2 * 2 : depth) * out_channels;
  const bool winograd = step.method == Method::kWinograd;
  STD_TORCH_CHECK(out_channels % direct::kPanel == 0, "scale: need channels in 32s, got ", out_channels);
  if (winograd) {
    const bool right = step.kernel == Pair{3, 3} && step.stride == Pair{1, 1} && step.dilation == Pair{1, 1};
    STD_TORCH_CHECK(right && channels % 16 == 0, "description: Winograd's method needs 3x3, stride 1, channels in 16s");
    // What it has written when it refuses, the direct sum could not read any more.
    STD_TORCH_CHECK(step.residual != step.to, "description: Winograd's method cannot add in place");
  }
  check_parameter(step.parameters[0], "filters", bf16, winograd ? 16 * channels * out_channels : direct);
  check_parameter(step.parameters[1], "scale", false, out_channels);
  check_parameter(step.parameters[2], "bias", false, out_channels);
  if (step.parameters.size() > 3) check_parameter(step.parameters[3], "filters", bf16, direct);
}

// The shape that a step gives.
Shape output_of(const Step& step, int64_t channels) {
  const auto size = [&](int axis, int64_t n) {
    const int64_t room = n + 2 * step.padding[axis] - step.dilation[axis] * (step.kernel[axis] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "x: got images of ", step.in.height, "x", step.in.width, " at a step, smaller than its window");
    return room / step.stride[axis] + 1;
  };
  return {channels, size(0, step.in.height), size(1, step.in.width)};
}

std::unique_ptr<Plan> read_plan(const std::vector<Tensor>& packed, const std::vector<int64_t>& description) {
  Integers integers(description);
  auto plan = std::make_unique<Plan>();
  plan->bf16 = integers.next(0, 1) == 1;
  STD_TORCH_CHECK(instructions(plan->bf16, "") != Instructions::kNone, "isa: this CPU lacks ",
                  plan->bf16 ? "AVX512_BF16" : "AVX2");
  const int64_t channels = integers.next(1), height = integers.next(1), width = integers.next(1);
  plan->in = {channels, height, width};
  plan->images = integers.next(1);
  const int64_t buffers = integers.next(0, 1024);
  for (int64_t i = 0; i < buffers; ++i) plan->buffers.push_back(integers.next(1));
  const int64_t steps = integers.next(1, 1 << 20);

  const auto places = static_cast<int64_t>(kBuffers) + buffers;
  std::vector<std::optional<Shape>> held(static_cast<size_t>(places));
  held[kInput] = plan->in;
  auto tensor = packed.begin();
  for (int64_t i = 0; i < steps; ++i) {
    STD_TORCH_CHECK(!plan->pooled, "description: nothing follows a mean");
    Step step{};
    step.kind = static_cast<Kind>(integers.next(0, 2));
    step.from = static_cast<size_t>(integers.next(0, places - 1));
    step.to = static_cast<size_t>(integers.next(1, places - 1));
    const int64_t residual = integers.next(-1, places - 1);
    if (residual >= 0) step.residual = static_cast<size_t>(residual);
    step.relu = integers.next(0, 1) == 1;
    step.method = static_cast<Method>(integers.next(0, 1));
    step.kernel = integers.pair(1), step.stride = integers.pair(1), step.padding = integers.pair(0);
    step.dilation = integers.pair(1);
    const int64_t tensors = integers.next(0, 4);
    STD_TORCH_CHECK(step.from != step.to && step.to != kIdentity, "description: a step writes where it reads");
    STD_TORCH_CHECK(held[step.from], "description: a step reads a place that nothing was written to");
    STD_TORCH_CHECK(packed.end() - tensor >= tensors, "packed: got ", packed.size(), " tensors, need more");
    step.in = *held[step.from];
    step.parameters.assign(tensor, tensor + tensors);
    tensor += tensors;
    if (step.kind == Kind::kConvolution) {
      STD_TORCH_CHECK(tensors == 3 || (tensors == 4 && step.method == Method::kWinograd), "packed: got ", tensors,
                      " tensors for a convolution, need 3, or 4 with Winograd's method");
      step.out = output_of(step, step.parameters[1].numel());
      check_convolution(step, plan->bf16);
    } else {
      STD_TORCH_CHECK(tensors == 0 && !step.residual && !step.relu, "description: pooling takes nothing but images");
      step.out = step.kind == Kind::kMean ? Shape{step.in.channels, 1, 1} : output_of(step, step.in.channels);
      for (const int axis : {0, 1}) {
        const int64_t reach = step.dilation[axis] * (step.kernel[axis] - 1) + 1;
        STD_TORCH_CHECK(step.padding[axis] <= reach / 2, "description: a window may lie in the padding");
      }
    }
    if (step.kind == Kind::kMean) {
      STD_TORCH_CHECK(step.to == kResult, "description: a mean is the result");
      plan->pooled = true;
    }
    if (step.residual == size_t{kIdentity}) plan->identity = true, held[kIdentity] = step.out;
    if (step.residual) STD_TORCH_CHECK(held[*step.residual] == step.out, "description: the sum is of two shapes");
    if (step.to >= kBuffers) {
      STD_TORCH_CHECK(step.out.elements() * plan->element() <= plan->buffers[step.to - kBuffers],
                      "description: a buffer is too small");
    }
    if (step.to == kResult) {
      STD_TORCH_CHECK(!held[kResult] || held[kResult] == step.out, "description: the result is of two shapes");
    }
    held[step.to] = step.out;
    plan->steps.push_back(std::move(step));
  }
  STD_TORCH_CHECK(integers.done() && tensor == packed.end(), "description: something is left over");
  STD_TORCH_CHECK(plan->steps.back().to == kResult, "description: the last step gives no result");
  plan->out = *held[kResult];
  STD_TORCH_CHECK(!plan->identity || held[kIdentity] == plan->out, "description: an identity of another shape");
  return plan;
}

direct::Problem direct_problem(const Step& s, int64_t images, const Tensor& filters, const void* x, const void* residual,
                               void* out) {
  direct::Problem p{};
  p.x = x, p.residual = residual, p.out = out;
  p.filters = filters.data_ptr();
  p.scale = static_cast<const float*>(s.parameters[1].data_ptr());
  p.bias = static_cast<const float*>(s.parameters[2].data_ptr());
  p.images = images, p.height = s.in.height, p.width = s.in.width, p.channels = s.in.channels;
  p.out_height = s.out.height, p.out_width = s.out.width, p.out_channels = s.out.channels;
  p.kernel_height = s.kernel[0], p.kernel_width = s.kernel[1];
  p.stride_height = s.stride[0], p.stride_width = s.stride[1];
  p.pad_height = s.padding[0], p.pad_width = s.padding[1];
  p.dilate_height = s.dilation[0], p.dilate_width = s.dilation[1];
  p.relu = s.relu;
  return p;
}

winograd::Problem winograd_problem(const Step& s, int64_t images, const void* x, const void* residual, void* out) {
  winograd::Problem p{};
  p.x = x, p.residual = residual, p.out = out;
  p.filters = s.parameters[0].data_ptr();
  p.scale = static_cast<const float*>(s.parameters[1].data_ptr());
  p.bias = static_cast<const float*>(s.parameters[2].data_ptr());
  p.images = images, p.height = s.in.height, p.width = s.in.width, p.channels = s.in.channels;
  p.out_height = s.out.height, p.out_width = s.out.width, p.out_channels = s.out.channels;
  p.pad_height = s.padding[0], p.pad_width = s.padding[1];
  p.relu = s.relu;
  return p;
}

// False: the direct sum has to be asked (see cpu.h), whose filters are not at hand.
bool run_step(const Step& s, bool bf16, int64_t images, const void* x, const void* residual, void* out) {
  switch (s.kind) {
    case Kind::kMaxPool:
      max_pool({x, out, images, s.in.height, s.in.width, s.in.channels, s.out.height, s.out.width, s.kernel, s.stride,
                s.padding, s.dilation},
               bf16);
      return true;
    case Kind::kMean:
      mean(x, out, images, s.in.height * s.in.width, s.in.channels, bf16);
      return true;
    case Kind::kConvolution:
      break;
  }
  const bool winograd = s.method == Method::kWinograd;
  if (winograd) {
    const winograd::Problem problem = winograd_problem(s, images, x, residual, out);
    if (winograd::convolve(problem, bf16, *winograd::kernel(bf16, ""))) return true;
    if (s.parameters.size() < 4) return false;
  }
  const Tensor& filters = s.parameters[winograd ? 3 : 0];
  direct::convolve(direct_problem(s, images, filters, x, residual, out), bf16, direct::kernel(bf16, ""));
  return true;
}

struct Answer {
  Tensor out;
  int64_t refused;  // the step whose direct filters are missing, with out unfinished; or -1
};

Tensor checked(const Tensor& t, const char* name, const Plan& plan, const Shape& shape, int64_t images) {
  const ScalarType dtype = plan.bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.dim() == 4 && t.size(0) == images &&
                      Shape({t.size(1), t.size(2), t.size(3)}) == shape,
                  name, ": got ", shape_text(t), ", need [", images, ", ", shape.channels, ", ", shape.height, ", ",
                  shape.width, "] of the plan's dtype on the CPU");
  return channels_last(t);
}

Answer run_plan(const Plan& plan, const Tensor& given, const OptionalTensor& given_identity) {
  STD_TORCH_CHECK(given.dim() == 4, "x: got ", shape_text(given), ", need 4 dimensions");
  const int64_t n = given.size(0);
  const Tensor x = checked(given, "x", plan, plan.in, n);
  STD_TORCH_CHECK(given_identity.has_value() == plan.identity, "identity: it is ", plan.identity ? "missing" : "not read");
  OptionalTensor identity;
  if (given_identity) identity = checked(*given_identity, "identity", plan, plan.out, n);
  const Shape& shape = plan.out;
  const Tensor out = plan.pooled ? empty_strided({n, shape.channels}, {shape.channels, 1}, x.scalar_type(), x)
                                 : empty_channels_last({n, shape.channels, shape.height, shape.width}, x);
  const int64_t most = std::min(plan.images, n), element = plan.element();
  std::vector<Tensor> buffers;
  for (const int64_t bytes : plan.buffers) buffers.push_back(empty_strided({bytes * most}, {1}, ScalarType::Byte, x));
  for (int64_t at = 0; at < n; at += most) {
    const int64_t count = std::min(most, n - at);
    const auto place = [&](size_t number) -> char* {
      const auto part = [&](const Tensor& t, const Shape& image) {
        return static_cast<char*>(t.data_ptr()) + at * image.elements() * element;
      };
      if (number == kInput) return part(x, plan.in);
      if (number == kResult) return part(out, shape);
      if (number == kIdentity) return part(*identity, shape);
      return static_cast<char*>(buffers[number - kBuffers].data_ptr());
    };
    for (size_t i = 0; i < plan.steps.size(); ++i) {
      const Step& step = plan.steps[i];
      const void* const residual = step.residual ? place(*step.residual) : nullptr;
      if (!run_step(step, plan.bf16, count, place(step.from), residual, place(step.to))) {
        return {out, static_cast<int64_t>(i)};
      }
    }
  }
  return {out, -1};
}

// A tensor of one element over the plan's memory, which lives as long as that tensor does.
void boxed_create(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto packed = arguments.read<std::vector<Tensor>>();
  const auto description = arguments.read<std::vector<int64_t>>();
  std::unique_ptr<Plan> plan = read_plan(packed, description);
  const int64_t one = 1;
  const Tensor handle = torch::stable::from_blob(
      plan.get(), {&one, 1}, {&one, 1}, torch::stable::Device(DeviceType::CPU), ScalarType::Long,
      [](void* memory) { delete static_cast<Plan*>(memory); });
  plan.release();
  give(stack, handle);
}

void boxed_run(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor handle = arguments.tensor(), x = arguments.tensor();
  const OptionalTensor identity = arguments.optional_tensor();
  STD_TORCH_CHECK(handle.is_cpu() && handle.scalar_type() == ScalarType::Long && handle.numel() == 1,
                  "handle: need what plan_create gave");
  const auto* const plan = static_cast<const Plan*>(handle.data_ptr());
  STD_TORCH_CHECK(plan->magic == (kMagic ^ reinterpret_cast<intptr_t>(plan)), "handle: need what plan_create gave");
  const Answer answer = run_plan(*plan, x, identity);
  stack[0] = torch::stable::detail::from(answer.out);
  stack[1] = torch::stable::detail::from(answer.refused);
}

}  // namespace

}  // namespace rf::cpu

// plan_create: packed holds the tensors of all steps, description their integers (resnet_fused/ops/cpu_plan.py).
// plan_run: the result, and -1; or the number of a step that has to be given its direct filters first.
STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("plan_create(Tensor[] packed, int[] description) -> Tensor");
  m.def("plan_run(Tensor handle, Tensor x, Tensor? identity=None) -> (Tensor, int)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) { m.impl("plan_run", &rf::cpu::boxed_run); }

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  m.impl("plan_create", &rf::cpu::boxed_create);
}
