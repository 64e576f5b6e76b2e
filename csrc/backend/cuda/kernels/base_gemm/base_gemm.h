#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backend/cuda/kernels/base_gemm/config.h"
#include "deltazip/base/dtype.h"

namespace deltazip::cuda {

// y = x * weight^T for few rows of x: weights stream through shared memory once.
struct StreamGemm {
  const void* x;            // [num_tokens, in_features], 16-byte aligned
  const void* weight;       // [out_features, in_features], 16-byte aligned
  void* y;                  // [num_tokens, out_features]
  float* partials;          // scratch, stream_gemm_partials_bytes
  std::uint32_t* counters;  // scratch, stream_gemm_counters_bytes, zero at first, not to be written
  std::int64_t num_tokens, in_features, out_features;
  DType dtype;    // of x and weight: kFloat16 or kBFloat16
  DType y_dtype;  // dtype, or kFloat32
  int num_sms;
  base_gemm::Form form;  // neighbours in a stream take turns
};

// At most kMaxTokens rows, in_features a multiple of 8 (16-byte rows, which tensor maps ask for),
// and code for Hopper, which has them.
bool stream_gemm_takes(const StreamGemm& params);
std::size_t stream_gemm_partials_bytes(int num_sms);
std::size_t stream_gemm_counters_bytes(std::int64_t out_features);

// Deterministic; the bits of a row do not depend on num_tokens. Reads weights before it waits for
// the kernel before it: they must not be written by that.
void launch_stream_gemm(const StreamGemm& params, cudaStream_t stream);

// The same product for any shape, alignment and number of rows, slowly.
struct PlainGemm {
  const void* x;       // [num_tokens, in_features]
  const void* weight;  // [out_features, in_features]
  void* y;             // [num_tokens, out_features], rows y_stride elements apart
  std::int64_t num_tokens, in_features, out_features;
  std::int64_t y_stride;
  DType dtype, y_dtype;
};
void launch_plain_gemm(const PlainGemm& params, cudaStream_t stream);

}  // namespace deltazip::cuda
