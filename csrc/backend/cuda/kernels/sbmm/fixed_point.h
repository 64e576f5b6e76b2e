#pragma once

// x as SBMM multiplies it: each 128 columns of a row in 16 bits, q * scale with |q| <= 32639 and
// the largest of them at that bound, q as two signed bytes, 256 high + low. Weights of up to eight
// bits times bytes are what integer tensor cores multiply, at twice the rate of fp16. An x is off
// by at most 2^-16 of the largest of its 128: fp16 rounds it by 2^-11 of itself.
//
// A row: [high bytes of all columns | low bytes | scales, float32], columns padded to whole
// records.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "backend/cuda/kernels/sbmm/record.h"
#include "deltazip/base/dtype.h"

namespace deltazip::cuda {

inline constexpr int kFixedPointMax = 127 * 256 + 127;

struct FixedPointRow {
  std::int64_t low_offset, scales_offset, num_bytes;
};

constexpr FixedPointRow fixed_point_row(std::int64_t columns) {
  const std::int64_t records = (columns + kRecordColumns - 1) / kRecordColumns;
  FixedPointRow row{};
  row.low_offset = records * kRecordColumns;
  row.scales_offset = 2 * row.low_offset;
  row.num_bytes = row.scales_offset + (records * 4 + 15) / 16 * 16;
  return row;
}

struct FixedPointLaunch {
  const void* x;  // [num_rows, x_stride]
  void* out;      // [num_rows, fixed_point_row(columns).num_bytes], 16-byte aligned
  std::int64_t num_rows, columns, x_stride;
  DType dtype;  // fp16 or bf16
};

// The scale of 128 columns with an infinity or a NaN among them is NaN.
void launch_fixed_point(const FixedPointLaunch& params, cudaStream_t stream);

}  // namespace deltazip::cuda
