// Plans that the caller keeps and launches again: plain bytes with the addresses of their tensors.
#pragma once

#include <cstring>
#include <exception>
#include <string>
#include <type_traits>

#include "common/torch.h"

namespace rf {

// Copies `plan` into a CPU tensor of bytes.
template <class Plan>
void put_plan(const Tensor& bytes, const Plan& plan) {
  static_assert(std::is_trivially_copyable_v<Plan>);
  const auto room = static_cast<size_t>(bytes.numel() * bytes.element_size());
  STD_TORCH_CHECK(bytes.device().type() == DeviceType::CPU && bytes.is_contiguous() && room >= sizeof(Plan),
                  "plan: need ", sizeof(Plan), " bytes on the CPU");
  std::memcpy(bytes.data_ptr(), &plan, sizeof(Plan));
}

// Null, or what `launch()` threw; the text stays until the thread's next call.
template <class Launch>
const char* launched(Launch&& launch) {
  static thread_local std::string text;
  try {
    launch();
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
  return nullptr;
}

}  // namespace rf
