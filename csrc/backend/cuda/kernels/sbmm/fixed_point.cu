#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "backend/cuda/kernels/device/launch.h"
#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/vec.cuh"
#include "backend/cuda/kernels/sbmm/fixed_point.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kPerLane = kRecordColumns / 32;

// Of bytes 0 of four words.
__device__ __forceinline__ std::uint32_t pack_bytes(const int (&v)[4]) {
  const std::uint32_t low = __byte_perm(v[0], v[1], 0x0040), high = __byte_perm(v[2], v[3], 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// A warp has 128 columns of a row, a lane four of them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fixed_point_kernel(const FixedPointLaunch params, const FixedPointRow layout, int records) {
  griddep_launch();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int record = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  const std::int64_t row = blockIdx.y;
  griddep_wait();
  if (record >= records) return;
  const int column = record * kRecordColumns + lane * kPerLane;
  const T* from = static_cast<const T*>(params.x) + row * params.x_stride + column;
  float x[kPerLane];
  if (column + kPerLane <= params.columns && reinterpret_cast<std::uintptr_t>(from) % 8 == 0) {
    const Vec<T, kPerLane> vec = load_vec<kPerLane>(from);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = to_float(vec.data[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = column + i < params.columns ? to_float(from[i]) : 0;
  }
  // As integers, magnitudes keep their order, and a NaN is above an infinity.
  std::uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    largest = max(largest, __float_as_uint(x[i]) & 0x7FFFFFFFu);
  }
  largest = __reduce_max_sync(0xFFFFFFFFu, largest);
  const bool is_finite = largest < 0x7F800000u;
  const float bound = __uint_as_float(largest);
  // Subnormal floats, which only bf16 has, would have an infinite factor.
  const float factor = is_finite && bound >= 1e-34F ? kFixedPointMax / bound : 0.0F;
  int high[kPerLane], low[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    low[i] = is_finite ? __float2int_rn(x[i] * factor) : 0;
    high[i] = (low[i] + 128) >> 8;
  }
  auto* out = static_cast<unsigned char*>(params.out) + row * layout.num_bytes;
  *reinterpret_cast<std::uint32_t*>(out + column) = pack_bytes(high);
  *reinterpret_cast<std::uint32_t*>(out + layout.low_offset + column) = pack_bytes(low);
  if (lane == 0) {
    reinterpret_cast<float*>(out + layout.scales_offset)[record] =
        is_finite ? bound / kFixedPointMax : __uint_as_float(0x7FC00000u);
  }
}

}  // namespace

void launch_fixed_point(const FixedPointLaunch& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const auto records = static_cast<int>((params.columns + kRecordColumns - 1) / kRecordColumns);
  constexpr std::int64_t kMaxRows = 65535;  // of a grid's second dimension
  const FixedPointRow layout = fixed_point_row(params.columns);
  const auto kernel = params.dtype == DType::kFloat16 ? fixed_point_kernel<__half>
                                                      : fixed_point_kernel<__nv_bfloat16>;
  for (std::int64_t row = 0; row < params.num_rows; row += kMaxRows) {
    FixedPointLaunch some = params;
    some.x = static_cast<const unsigned char*>(params.x) + row * params.x_stride * 2;
    some.out = static_cast<unsigned char*>(params.out) + row * layout.num_bytes;
    const dim3 grid(static_cast<unsigned>((records + kWarps - 1) / kWarps),
                    static_cast<unsigned>(std::min(params.num_rows - row, kMaxRows)));
    launch(kernel, {grid, dim3(kThreads), 0}, stream, some, layout, records);
  }
}

}  // namespace deltazip::cuda
