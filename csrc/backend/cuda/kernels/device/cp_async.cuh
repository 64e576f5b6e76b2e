#pragma once

#include <cstdint>

namespace deltazip::cuda {

// Copies 16 bytes from global to shared memory past the L1; both sides 16-byte aligned.
__device__ __forceinline__ void cp_async_16(std::uint32_t smem, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(smem), "l"(global) : "memory");
}

// The same, or sixteen zero bytes (global is then not read) where is_valid is false.
__device__ __forceinline__ void cp_async_16(std::uint32_t smem, const void* global, bool is_valid) {
  const int num_bytes = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem), "l"(global),
               "r"(num_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are still under way. Other threads'
// copies are visible only after a barrier that follows.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace deltazip::cuda
