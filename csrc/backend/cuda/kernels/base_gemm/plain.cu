#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backend/cuda/kernels/base_gemm/base_gemm.h"
#include "backend/cuda/kernels/device/launch.h"
#include "backend/cuda/kernels/device/pdl.cuh"

namespace deltazip::cuda {
namespace {

constexpr int kWarps = 8, kTokens = 8;

// One warp an out row, kTokens rows of x at a time; lanes stride along k, then add up by halves.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) plain_gemm(const PlainGemm p) {
  griddep_launch();
  griddep_wait();
  const int lane = static_cast<int>(threadIdx.x & 31);
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + (threadIdx.x >> 5);
  if (row >= p.out_features) return;
  const T* weight = static_cast<const T*>(p.weight) + row * p.in_features;
  for (std::int64_t first = std::int64_t{blockIdx.y} * kTokens; first < p.num_tokens;
       first += std::int64_t{gridDim.y} * kTokens) {
    const T* x = static_cast<const T*>(p.x) + first * p.in_features;
    const std::int64_t count = min(p.num_tokens - first, std::int64_t{kTokens});
    float sums[kTokens] = {};
    for (std::int64_t k = lane; k < p.in_features; k += 32) {
      const float w = static_cast<float>(weight[k]);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t < count) sums[t] = fmaf(w, static_cast<float>(x[t * p.in_features + k]), sums[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int apart = 16; apart > 0; apart /= 2) {
        sums[t] += __shfl_xor_sync(0xFFFFFFFFU, sums[t], apart);
      }
      if (lane != 0 || t >= count) continue;
      const std::int64_t at = (first + t) * p.y_stride + row;
      if (p.y_dtype == DType::kFloat32) {
        static_cast<float*>(p.y)[at] = sums[t];
      } else {
        static_cast<T*>(p.y)[at] = static_cast<T>(sums[t]);
      }
    }
  }
}

}  // namespace

void launch_plain_gemm(const PlainGemm& params, cudaStream_t stream) {
  const auto blocks = [](std::int64_t count, int size) {
    return static_cast<unsigned>((count + size - 1) / size);
  };
  const unsigned token_blocks = blocks(params.num_tokens, kTokens);
  const LaunchShape shape{
      {blocks(params.out_features, kWarps), token_blocks < 65535 ? token_blocks : 65535},
      32 * kWarps};
  if (params.dtype == DType::kFloat16) {
    launch(plain_gemm<__half>, shape, stream, params);
  } else {
    launch(plain_gemm<__nv_bfloat16>, shape, stream, params);
  }
}

}  // namespace deltazip::cuda
