#pragma once

// From the warps' sums of a row block to y. The order of additions is fixed by the matrix alone:
// within a column part its records from the first on; then the parts, (0 + 1) + (2 + 3); then y.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "backend/cuda/kernels/sbmm/config.h"
#include "backend/cuda/kernels/sbmm/sbmm.h"

namespace deltazip::cuda {

// Where the rows 2 lane and 2 lane + 1 of a row block lie in y, for one token.
struct OutputPlace {
  void* y;
  bool has_first, has_second;  // which of the two rows exist
  bool is_vector;              // both in one aligned access
};

// The bits of y, for unpack_output(): to convert them here would be to wait for them here.
template <typename T>
__device__ __forceinline__ uint2 load_output(const OutputPlace& place, bool is_float) {
  uint2 bits{0, 0};
  if (is_float) {
    const auto* y = static_cast<const std::uint32_t*>(place.y);
    if (place.is_vector) return *reinterpret_cast<const uint2*>(y);
    if (place.has_first) bits.x = y[0];
    if (place.has_second) bits.y = y[1];
  } else if (place.is_vector) {
    bits.x = *static_cast<const std::uint32_t*>(place.y);
  } else {
    const auto* y = static_cast<const std::uint16_t*>(place.y);
    if (place.has_first) bits.x = y[0];
    if (place.has_second) bits.y = y[1];
  }
  return bits;
}

template <typename T>
__device__ __forceinline__ float2 unpack_output(uint2 bits, bool is_vector, bool is_float) {
  if (is_float) return {__uint_as_float(bits.x), __uint_as_float(bits.y)};
  const std::uint32_t pair = is_vector ? bits.x : bits.x | bits.y << 16;
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

template <typename T>
__device__ __forceinline__ void store_output(const OutputPlace& place, bool is_float,
                                             float2 value) {
  if (is_float) {
    auto* y = static_cast<float*>(place.y);
    if (place.is_vector) {
      *reinterpret_cast<float2*>(y) = value;
      return;
    }
    if (place.has_first) y[0] = value.x;
    if (place.has_second) y[1] = value.y;
  } else {
    auto* y = static_cast<T*>(place.y);
    if (place.is_vector) {
      if constexpr (std::is_same_v<T, __half>) {
        *reinterpret_cast<__half2*>(y) = __float22half2_rn(value);
      } else {
        *reinterpret_cast<__nv_bfloat162*>(y) = __float22bfloat162_rn(value);
      }
      return;
    }
    if (place.has_first) y[0] = static_cast<T>(value.x);
    if (place.has_second) y[1] = static_cast<T>(value.y);
  }
}

// The sums of a set's row blocks. Warp w owns tokens w and w + 8, lane l rows 2 l and 2 l + 1. One
// barrier a row block: sums alternate between two buffers.
template <typename T, int kTiles>
class BlockSums {
 public:
  __device__ BlockSums(const SbmmLaunch& params, const SbmmDeviceTask& task, float* sums,
                       int first_token, int num_tokens, int first_block, int warp, int lane)
      : is_float_(params.y_dtype == DType::kFloat32),
        y_(static_cast<unsigned char*>(params.y)),
        token_stride_(params.y_stride * kTokenTile),
        from_(sums + warp * kSumPitch + 2 * lane),
        to_(sums + warp / kRowPairs * (num_tokens * kSumPitch) + warp % kRowPairs * 32 + lane / 4),
        rows_left_(task.rows - first_block * kRecordRows - 2 * lane),
        num_tokens_(num_tokens),
        warp_(warp),
        lane_(lane),
        buffer_(0) {
    offset_ = (static_cast<std::int64_t>(task.first_row) + first_token + warp) * params.y_stride +
              task.out_offset + first_block * kRecordRows + 2 * lane;
  }

  // Asks for y of the row block at hand.
  __device__ __forceinline__ void read_output() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (warp_ + n * kTokenTile < num_tokens_) y_before_[n] = load_output<T>(place(n), is_float_);
    }
  }

  // Writes the row block at hand, and goes on to the next.
  __device__ __forceinline__ void finish(const float (&acc)[2][kTiles][4]) {
    const int buffer = buffer_ * (kColumnParts * num_tokens_ * kSumPitch);
    float* to = to_ + buffer;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = n * kTokenTile + lane_ % 4 * 2 + i;
        if (token >= num_tokens_) continue;
        float* column = to + token * kSumPitch;
        column[0] = acc[0][n][i];
        column[8] = acc[0][n][2 + i];
        column[16] = acc[1][n][i];
        column[24] = acc[1][n][2 + i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (warp_ + n * kTokenTile >= num_tokens_) continue;
      const float* from = from_ + buffer + n * kTokenTile * kSumPitch;
      float2 p[kColumnParts];
#pragma unroll
      for (int i = 0; i < kColumnParts; ++i) {
        p[i] = *reinterpret_cast<const float2*>(from + i * num_tokens_ * kSumPitch);
      }
      static_assert(kColumnParts == 4);
      const OutputPlace to_y = place(n);
      const float2 y = unpack_output<T>(y_before_[n], to_y.is_vector, is_float_);
      store_output<T>(to_y, is_float_,
                      {y.x + ((p[0].x + p[1].x) + (p[2].x + p[3].x)),
                       y.y + ((p[0].y + p[1].y) + (p[2].y + p[3].y))});
    }
    buffer_ ^= 1;
    offset_ += kRecordRows;
    rows_left_ -= kRecordRows;
  }

 private:
  __device__ __forceinline__ OutputPlace place(int n) const {
    const int size = is_float_ ? 4 : 2;
    OutputPlace out;
    out.y = y_ + (offset_ + n * token_stride_) * size;
    // Two comparisons, not one clamped count: of a clamp compared with 2, ptxas 13.0 made a
    // predicate that held for no rows too, and a lane stored the rows of another task.
    out.has_first = rows_left_ > 0;
    out.has_second = rows_left_ > 1;
    out.is_vector = out.has_second && reinterpret_cast<std::uintptr_t>(out.y) % (2 * size) == 0;
    return out;
  }

  bool is_float_;
  unsigned char* y_;
  std::int64_t token_stride_, offset_;
  const float* from_;
  float* to_;
  int rows_left_, num_tokens_, warp_, lane_, buffer_;
  uint2 y_before_[kTiles] = {};
};

}  // namespace deltazip::cuda
