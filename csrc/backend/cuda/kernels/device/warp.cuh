#pragma once

#include <cstdint>

namespace deltazip::cuda {

// 8x8 matrix of 16-bit elements, lane 4r + c holding row r, columns 2c and 2c + 1: transposed.
__device__ __forceinline__ std::uint32_t transpose_8x8(std::uint32_t pair) {
  std::uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(pair));
  return out;
}

// A barrier of some warps of the CTA; __syncthreads is barrier 0.
__device__ __forceinline__ void named_barrier_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(num_threads) : "memory");
}

}  // namespace deltazip::cuda
