#pragma once

#include <cstdint>

namespace deltazip::cuda {

// Products of signed bytes, summed in 32-bit integers. With lane = 4q + c, d[0..1] = (row q,
// columns 2c, 2c + 1), d[2..3] = (row q + 8, those). Four bytes of a register follow each other
// along k.

// d = a * b, or d += a * b; a is 16x64, two of every four along k kept; b is 64x8 by columns.
// a[i]: row q + 8 (i % 2), the kept pairs of groups 8 (i / 2) + 2c and the next.
// b[i]: k 16i + 4c .. + 3, column q.
// metadata of lane 4q + 2h + r: row q + 8r, groups 8h .. 8h + 7, a nibble index0 | index1 << 2
// each; index0 < index1 must hold even where values are zero. (The ISA shows this as a picture
// only: found by turning over one nibble after the other on an H100.)
template <bool kAdds>
__device__ __forceinline__ void mma_sp_m16n8k64(int (&d)[4], const std::uint32_t (&a)[4],
                                                std::uint32_t b0, std::uint32_t b1,
                                                std::uint32_t b2, std::uint32_t b3,
                                                std::uint32_t metadata) {
  if constexpr (kAdds) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(b2), "r"(b3),
          "r"(metadata));
  } else {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%13, %13, %13, %13}, %12, 0x0;\n"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(b2), "r"(b3),
          "r"(metadata), "r"(0));
  }
}

// d = a * b, or d += a * b; a is 16x32 by rows, b 32x8 by columns.
// a[i]: row q + 8 (i % 2), k 16 (i / 2) + 4c .. + 3; b0: k 4c .. + 3, b1: 16 further, column q.
template <bool kAdds>
__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], const std::uint32_t (&a)[4],
                                             std::uint32_t b0, std::uint32_t b1) {
  if constexpr (kAdds) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};\n"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
  }
}

}  // namespace deltazip::cuda
