// Which vector instructions this CPU has, among those that kernels are compiled for.
#pragma once

#include <cstdint>
#include <string>

namespace rf::cpu {

enum class Instructions { kNone, kAvx2, kAvx512, kAvx512Bf16 };

// Those to compute the element with: the widest, or the ones named; kNone where this CPU or the element does not know
// them. Names are those of the kernels' namespaces.
inline Instructions instructions(bool bf16, const std::string& name) {
#ifdef __x86_64__
  const auto asked = [&](const char* isa) { return name.empty() || name == isa; };
  const bool fma = __builtin_cpu_supports("fma"), avx512 = fma && __builtin_cpu_supports("avx512f");
  if (bf16) {
    const bool able = avx512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
    return able && asked("avx512bf16") ? Instructions::kAvx512Bf16 : Instructions::kNone;
  }
  if (avx512 && asked("avx512")) return Instructions::kAvx512;
  if (fma && __builtin_cpu_supports("avx2") && asked("avx2")) return Instructions::kAvx2;
#endif
  return Instructions::kNone;
}

// The one of a kernel's versions for these instructions, or null.
template <class Run>
Run* version(Instructions found, Run* avx512bf16, Run* avx512, Run* avx2) {
  switch (found) {
    case Instructions::kAvx512Bf16:
      return avx512bf16;
    case Instructions::kAvx512:
      return avx512;
    case Instructions::kAvx2:
      return avx2;
    case Instructions::kNone:
      break;
  }
  return nullptr;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace rf::cpu
