#pragma once

#include <cstdint>

namespace deltazip::cuda {

// CTAs of a cluster run at the same time and reach each other's shared memory.

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// What threads wrote before arriving, all threads of the cluster see after waiting.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The place of `pointer`, into this CTA's shared memory, in the CTA of that rank.
template <typename T>
__device__ __forceinline__ T* in_cta(T* pointer, std::uint32_t rank) {
  T* result;
  asm("mapa.u64 %0, %1, %2;" : "=l"(result) : "l"(pointer), "r"(rank));
  return result;
}

}  // namespace deltazip::cuda
