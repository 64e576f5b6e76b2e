#pragma once

#include <cstdint>

namespace deltazip::cuda {

// The 32-bit address that ldmatrix, cp.async and mbarrier instructions take.
__device__ __forceinline__ std::uint32_t smem_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float load_shared_float(std::uint32_t smem) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(value) : "r"(smem) : "memory");
  return value;
}

}  // namespace deltazip::cuda
