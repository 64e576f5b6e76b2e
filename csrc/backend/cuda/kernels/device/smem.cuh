#pragma once

#include <cstdint>

namespace deltazip::cuda {

// The 32-bit address that ldmatrix, cp.async and mbarrier instructions take.
__device__ __forceinline__ std::uint32_t smem_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace deltazip::cuda
