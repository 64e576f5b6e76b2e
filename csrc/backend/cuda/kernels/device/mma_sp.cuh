#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace deltazip::cuda {

// d += a * b; a is 16x32, two of every four along k kept; b is 32x8 by columns, d 16x8.
// With lane = 4q + c: a[0] = (row q, group c), a[1] = (q + 8, c), a[2] = (q, c + 4), a[3] = (q + 8,
// c + 4), each register a group's two kept values; b[i] = (k 8i + 2c and the next, column q);
// d[0..1] = (q, 2c..), d[2..3] = (q + 8, 2c..). Metadata comes from lanes with c / 2 == kSelector:
// c & 1 is the half of k (groups 0-3 or 4-7), low half-word row q, high half-word row q + 8, a
// nibble index0 | index1 << 2 for each group. index0 < index1 must hold even where values are zero.
template <typename T, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[4],
                                                std::uint32_t metadata) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, "
        "%3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  }
}

}  // namespace deltazip::cuda
