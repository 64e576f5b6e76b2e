// residual += x; out = residual / rms(residual) * gain. One CTA a row, every byte touched once.

#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/vec.cuh"
#include "backend/cuda/kernels/rowwise/config.h"
#include "backend/cuda/kernels/rowwise/rowwise.h"

namespace deltazip::cuda {
namespace {

using rowwise::kMaxNormVectors;
using rowwise::kNormThreads;

// The same sum in every thread. The order depends on the CTA's size alone, hence on the row's.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warp_sums[kNormThreads / 32];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  value = lane < num_warps ? warp_sums[lane] : 0.0F;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  return value;
}

template <typename T, int kWidth>
struct NormRow {
  __device__ NormRow(const RmsNormLaunch& params)
      : x(static_cast<const T*>(params.x) + blockIdx.x * params.hidden_size),
        residual(static_cast<T*>(params.residual) + blockIdx.x * params.hidden_size),
        out(static_cast<T*>(params.out) + blockIdx.x * params.hidden_size),
        has_x(params.x != nullptr) {}

  // The summed residual at i, as it is rounded and stored: what a later layer will read.
  __device__ __forceinline__ Vec<T, kWidth> add(std::int64_t i, float& squares) const {
    Vec<T, kWidth> value = load_vec<kWidth>(residual + i);
    if (has_x) {
      const Vec<T, kWidth> addend = load_vec<kWidth>(x + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        value.data[j] = from_float<T>(to_float(value.data[j]) + to_float(addend.data[j]));
      }
      store_vec(residual + i, value);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      squares = __fmaf_rn(to_float(value.data[j]), to_float(value.data[j]), squares);
    }
    return value;
  }
  __device__ __forceinline__ void scale(std::int64_t i, const Vec<T, kWidth>& value, float factor,
                                        const float (&gains)[kWidth]) const {
    Vec<T, kWidth> result;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      result.data[j] = from_float<T>(to_float(value.data[j]) * factor * gains[j]);
    }
    store_vec(out + i, result);
  }

  const T* x;
  T* residual;
  T* out;
  bool has_x;
};

__device__ __forceinline__ float norm_factor(float squares, const RmsNormLaunch& params) {
  const float mean = block_sum(squares) / static_cast<float>(params.hidden_size);
  return 1.0F / sqrtf(mean + params.epsilon);
}

// The row stays in registers between the sum and the scaling.
template <typename T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(const RmsNormLaunch params) {
  griddep_launch();
  const float* row_gain = params.row_gains[blockIdx.x];
  float gains[kVectors][kWidth];
  const auto for_vectors = [&](auto body) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t i = (std::int64_t{v} * blockDim.x + threadIdx.x) * kWidth;
      if (i < params.hidden_size) body(v, i);
    }
  };
  for_vectors([&](int v, std::int64_t i) { load_floats(gains[v], row_gain + i); });
  griddep_wait();
  const NormRow<T, kWidth> row(params);
  Vec<T, kWidth> values[kVectors];
  float squares = 0.0F;
  for_vectors([&](int v, std::int64_t i) { values[v] = row.add(i, squares); });
  const float factor = norm_factor(squares, params);
  for_vectors([&](int v, std::int64_t i) { row.scale(i, values[v], factor, gains[v]); });
}

// For rows that fit no registers, or no vectors: reads again what it wrote.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kNormThreads) rms_norm_long_kernel(const RmsNormLaunch params) {
  griddep_launch();
  const float* row_gain = params.row_gains[blockIdx.x];
  const std::int64_t first = std::int64_t{threadIdx.x} * kWidth;
  const std::int64_t step = std::int64_t{blockDim.x} * kWidth;
  griddep_wait();
  const NormRow<T, kWidth> row(params);
  float squares = 0.0F;
  for (std::int64_t i = first; i < params.hidden_size; i += step) row.add(i, squares);
  const float factor = norm_factor(squares, params);
  for (std::int64_t i = first; i < params.hidden_size; i += step) {
    float gains[kWidth];
    load_floats(gains, row_gain + i);
    row.scale(i, load_vec<kWidth>(row.residual + i), factor, gains);
  }
}

}  // namespace

void launch_rms_norm(const RmsNormLaunch& params, cudaStream_t stream) {
  rowwise::dispatch("rms_norm", params.dtype, params.hidden_size, [&]<typename T, int kWidth>() {
    const std::int64_t num_vectors = params.hidden_size / kWidth;
    const std::int64_t per_thread = rowwise::divide_up(num_vectors, kNormThreads);
    const std::int64_t threads =
        std::min<std::int64_t>(kNormThreads, rowwise::divide_up(num_vectors, 32) * 32);
    const LaunchShape shape{dim3(static_cast<unsigned>(params.num_rows)),
                            dim3(static_cast<unsigned>(threads)), 0};
    if constexpr (kWidth > 1) {
      if (per_thread == 1) return launch(rms_norm_kernel<T, kWidth, 1>, shape, stream, params);
      if (per_thread == 2) return launch(rms_norm_kernel<T, kWidth, 2>, shape, stream, params);
      if (per_thread <= kMaxNormVectors) {
        return launch(rms_norm_kernel<T, kWidth, kMaxNormVectors>, shape, stream, params);
      }
    }
    launch(rms_norm_long_kernel<T, kWidth>, shape, stream, params);
  });
}

}  // namespace deltazip::cuda
