#pragma once

#include <cstdint>

namespace deltazip::cuda {

// Adds and returns what was there. What the calling warp wrote before (after __syncwarp) is seen
// by whoever reads after an add that came later.
__device__ __forceinline__ std::uint32_t add_acq_rel(std::uint32_t* counter, std::uint32_t value) {
  std::uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;\n"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

}  // namespace deltazip::cuda
