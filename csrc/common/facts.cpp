// Where tensors are and how they are laid out, as numbers: what tells that a tensor was given other memory or another
// shape, which its version does not count.
#include <algorithm>

#include "common/torch.h"

namespace rf {

namespace {

// address, dtype, number of dimensions, sizes and strides, of one tensor after the other
template <class Each>
bool each_fact(const std::vector<Tensor>& tensors, Each&& each) {
  for (const Tensor& t : tensors) {
    const auto dtype = static_cast<int64_t>(t.scalar_type());
    bool same = each(reinterpret_cast<int64_t>(t.data_ptr())) && each(dtype) && each(t.dim());
    for (const int64_t size : t.sizes()) same = same && each(size);
    for (const int64_t stride : t.strides()) same = same && each(stride);
    if (!same) return false;
  }
  return true;
}

Tensor facts(const std::vector<Tensor>& tensors) {
  std::vector<int64_t> values;
  each_fact(tensors, [&](int64_t value) {
    values.push_back(value);
    return true;
  });
  const Tensor result = torch::stable::empty({static_cast<int64_t>(values.size())}, ScalarType::Long);
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(result.data_ptr()));
  return result;
}

bool holds(const Tensor& facts, const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(facts.is_cpu() && facts.scalar_type() == ScalarType::Long && facts.is_contiguous(),
                  "facts: need what tensor_facts gave");
  const auto* next = static_cast<const int64_t*>(facts.data_ptr());
  const int64_t* const end = next + facts.numel();
  return each_fact(tensors, [&](int64_t value) { return next != end && *next++ == value; }) && next == end;
}

void boxed_facts(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  give(stack, facts(arguments.read<std::vector<Tensor>>()));
}

void boxed_holds(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor facts = arguments.tensor();
  stack[0] = torch::stable::detail::from(holds(facts, arguments.read<std::vector<Tensor>>()));
}

}  // namespace

}  // namespace rf

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("tensor_facts(Tensor[] tensors) -> Tensor");
  m.def("tensor_facts_hold(Tensor facts, Tensor[] tensors) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  m.impl("tensor_facts", &rf::boxed_facts);
  m.impl("tensor_facts_hold", &rf::boxed_holds);
}
