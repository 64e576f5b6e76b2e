#pragma once

// Loads of data that is read once: past L1, first to go from L2. For memory that no kernel of the
// stream writes.

#include <cstdint>

namespace deltazip::cuda {

// What createpolicy.fractional.L2::evict_first says for 1.0 (CUTLASS has it as a constant too). As
// an instruction's result it costs every load two moves to uniform registers.
inline constexpr std::uint64_t kEvictFirst = 0x12F0000000000000ULL;

__device__ __forceinline__ uint4 stream_load(const uint4* from, std::uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "l"(policy));
  return v;
}

__device__ __forceinline__ uint2 stream_load(const uint2* from, std::uint64_t policy) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.b32 {%0, %1}, [%2], %3;"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from), "l"(policy));
  return v;
}

__device__ __forceinline__ std::uint32_t stream_load(const std::uint32_t* from,
                                                     std::uint64_t policy) {
  std::uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.b32 %0, [%1], %2;"
               : "=r"(v)
               : "l"(from), "l"(policy));
  return v;
}

}  // namespace deltazip::cuda
