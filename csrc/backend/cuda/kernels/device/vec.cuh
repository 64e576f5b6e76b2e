#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace deltazip::cuda {

// kSize neighbours that one instruction loads or stores; 16 bytes at most.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  static_assert(sizeof(T) * kSize <= 16);
  T data[kSize];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (requires(T t) { __half2float(t); }) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

template <int kSize, typename T>
__device__ __forceinline__ Vec<T, kSize> load_vec(const T* pointer) {
  return *reinterpret_cast<const Vec<T, kSize>*>(pointer);
}

template <int kSize, typename T>
__device__ __forceinline__ void store_vec(T* pointer, const Vec<T, kSize>& vec) {
  *reinterpret_cast<Vec<T, kSize>*>(pointer) = vec;
}

// kSize floats, by as many loads of up to 16 bytes as that takes.
template <int kSize>
__device__ __forceinline__ void load_floats(float (&values)[kSize], const float* pointer) {
  constexpr int kWidth = kSize < 4 ? kSize : 4;
#pragma unroll
  for (int i = 0; i < kSize; i += kWidth) {
    const Vec<float, kWidth> vec = load_vec<kWidth>(pointer + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[i + j] = vec.data[j];
  }
}

}  // namespace deltazip::cuda
