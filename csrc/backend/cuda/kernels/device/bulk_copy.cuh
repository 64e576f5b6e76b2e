#pragma once

#include <cstdint>

namespace deltazip::cuda {

// How long L2 keeps what a copy reads: for what is read once, and for what everybody reads.
__device__ __forceinline__ std::uint64_t policy_evict_first() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ std::uint64_t policy_evict_last() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

// Copies num_bytes (a multiple of 16, both sides 16-byte aligned) by the copy engine; completion
// counts on the mbarrier. One thread issues it.
__device__ __forceinline__ void bulk_copy(std::uint32_t smem, const void* global,
                                          std::uint32_t num_bytes, std::uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem),
      "l"(global), "r"(num_bytes), "r"(mbarrier)
      : "memory");
}

__device__ __forceinline__ void bulk_copy(std::uint32_t smem, const void* global,
                                          std::uint32_t num_bytes, std::uint32_t mbarrier,
                                          std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], "
      "%2, [%3], %4;" ::"r"(smem),
      "l"(global), "r"(num_bytes), "r"(mbarrier), "l"(policy)
      : "memory");
}

// Sends num_bytes (a multiple of 16, 16-byte aligned) towards L2. One thread issues it.
__device__ __forceinline__ void bulk_prefetch(const void* global, std::uint32_t num_bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(num_bytes)
               : "memory");
#endif
}

// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace deltazip::cuda
