#include <cuda_bf16.h>

#include "backend/cuda/kernels/device/launch.h"
#include "backend/cuda/kernels/device/mma.cuh"
#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/sbmm/row_reader.cuh"
#include "backend/cuda/kernels/sbmm/sbmm.h"

namespace deltazip::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerThread = kRecordRows / (kThreads / kRecordGroups);

template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

// One CTA a record; a warp has a row of it, a lane four columns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_delta_kernel(const AddDeltaLaunch params, const RecordLayout layout) {
  griddep_wait();
  griddep_launch();
  const DeltaMatrix& delta = params.delta;
  const std::int64_t group = blockIdx.x * kRecordGroups + threadIdx.x % kRecordGroups;
  const std::int64_t first_row =
      static_cast<std::int64_t>(blockIdx.y) * kRecordRows + threadIdx.x / kRecordGroups;
  if (group * 4 >= delta.columns) return;
  const bool is_vector = delta.columns % 4 == 0;
  uint2 weights[kRowsPerThread];
  if (is_vector) {
    // All loads of weights first: their latency is the kernel's.
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const std::int64_t row = first_row + i * (kThreads / kRecordGroups);
      if (row < delta.rows) {
        weights[i] = *reinterpret_cast<const uint2*>(static_cast<const T*>(params.weight) +
                                                     row * delta.columns + group * 4);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const std::int64_t row = first_row + i * (kThreads / kRecordGroups);
    if (row >= delta.rows) return;
    const DeltaWeights add = read_delta(delta, layout, row, group);
    const std::int64_t at = row * delta.columns + group * 4;
    T* out = static_cast<T*>(params.out) + at;
    if (is_vector) {
      const float2 a = unpack<T>(weights[i].x), b = unpack<T>(weights[i].y);
      *reinterpret_cast<uint2*>(out) = {pack_pair<T>(a.x + add.v[0], a.y + add.v[1]),
                                        pack_pair<T>(b.x + add.v[2], b.y + add.v[3])};
    } else {
      const T* weight = static_cast<const T*>(params.weight) + at;
      for (int k = 0; k < 4 && group * 4 + k < delta.columns; ++k) {
        out[k] = static_cast<T>(static_cast<float>(weight[k]) + add.v[k]);
      }
    }
  }
}

}  // namespace

void launch_add_delta(const AddDeltaLaunch& params, cudaStream_t stream) {
  const DeltaMatrix& delta = params.delta;
  const RecordLayout layout =
      record_layout(delta.type, delta.rows, delta.columns, delta.group_size);
  const auto kernel =
      params.dtype == DType::kFloat16 ? add_delta_kernel<__half> : add_delta_kernel<__nv_bfloat16>;
  const dim3 grid(static_cast<unsigned>(layout.records), static_cast<unsigned>(layout.row_blocks));
  launch(kernel, {grid, dim3(kThreads), 0}, stream, params, layout);
}

}  // namespace deltazip::cuda
