#pragma once

#include <cuda.h>

#include <cstdint>

namespace deltazip::cuda {

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// One box of a 2-D tensor map, its corner at (column, row), into shared memory. The barrier gets
// the whole box's bytes: what lies outside of the matrix is written as zeros.
__device__ __forceinline__ void tensor_copy_2d(std::uint32_t smem, const CUtensorMap* map,
                                               int column, int row, std::uint32_t barrier,
                                               std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(smem),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

}  // namespace deltazip::cuda
