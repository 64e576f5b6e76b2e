#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "backend/cuda/kernels/sbmm/plan.h"
#include "deltazip/base/dtype.h"

namespace deltazip::cuda {

// y[row, out_offset + n] += sum over k of x[row, k] * delta[n, k], for the rows of every task.
// All pointers are device memory; x is what launch_fixed_point() makes of it. num_ctas should be
// kCtasPerSm times the number of multiprocessors.
struct SbmmLaunch {
  const void* x;  // [rows, x_row_bytes], fixed_point.h
  void* y;        // [rows, y_stride]
  const SbmmDeviceTask* tasks;
  const SbmmCtaRange* ranges;  // [num_ctas]
  std::int64_t x_row_bytes, y_stride;
  std::int32_t num_ctas;
  DType y_dtype;  // fp16, bf16 or float32
};

void launch_sbmm(const SbmmLaunch& params, cudaStream_t stream);

// out = weight + delta, [rows, columns] row-major, rounded once: for many tokens of one variant a
// dense product with the sum is cheaper than two products.
struct AddDeltaLaunch {
  const void* weight;  // [rows, columns]
  DeltaMatrix delta;
  void* out;    // [rows, columns]; may be weight
  DType dtype;  // of weight and out: fp16 or bf16
};

void launch_add_delta(const AddDeltaLaunch& params, cudaStream_t stream);

}  // namespace deltazip::cuda
