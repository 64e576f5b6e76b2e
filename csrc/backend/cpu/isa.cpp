#include "backend/cpu/isa.h"

#if defined(DELTAZIP_CPU_X86)
#include <cpuid.h>
#endif

#include "deltazip/base/error.h"

namespace deltazip::cpu {
namespace {

#if defined(DELTAZIP_CPU_X86)
// Asked of the processor: clang 14 has no name for it in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> available{&kernels_scalar()};
#if defined(DELTAZIP_CPU_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 && has_f16c()) {
    available.push_back(&kernels_avx2());
    if (__builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
        __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0) {
      available.push_back(&kernels_avx512());
    }
  }
#endif
  return available;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& choose_kernels(std::string_view isa) {
  const std::vector<const Kernels*> available = available_kernels();
  if (isa.empty()) return *available.back();
  std::string names;
  for (const Kernels* kernels : available) {
    if (kernels->name == isa) return *kernels;
    names += names.empty() ? "" : ", ";
    names += kernels->name;
  }
  detail::fail<InvalidArgument>("cpu: isa '", isa, "' is not one this machine runs: ", names);
}

}  // namespace deltazip::cpu
