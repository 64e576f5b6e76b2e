#pragma once

// From the warps' sums of a row block to y. The order of additions is fixed by the matrix alone:
// within a column part its records from the first on; then the parts, (0 + 1) + (2 + 3); then y.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "backend/cuda/kernels/device/mma.cuh"
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

__device__ __forceinline__ float2 unpack_output(uint2 bits, bool is_vector, DType dtype) {
  if (dtype == DType::kFloat32) return {__uint_as_float(bits.x), __uint_as_float(bits.y)};
  const std::uint32_t pair = is_vector ? bits.x : bits.x | bits.y << 16;
  if (dtype == DType::kFloat16) return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

__device__ __forceinline__ void store_output(const OutputPlace& place, DType dtype, float2 value) {
  if (dtype == DType::kFloat32) {
    auto* y = static_cast<float*>(place.y);
    if (place.is_vector) {
      *reinterpret_cast<float2*>(y) = value;
      return;
    }
    if (place.has_first) y[0] = value.x;
    if (place.has_second) y[1] = value.y;
    return;
  }
  const std::uint32_t pair = dtype == DType::kFloat16 ? pack_pair<__half>(value.x, value.y)
                                                      : pack_pair<__nv_bfloat16>(value.x, value.y);
  if (place.is_vector) {
    *static_cast<std::uint32_t*>(place.y) = pair;
    return;
  }
  auto* y = static_cast<std::uint16_t*>(place.y);
  if (place.has_first) y[0] = static_cast<std::uint16_t>(pair);
  if (place.has_second) y[1] = static_cast<std::uint16_t>(pair >> 16);
}

// The sums of a set's row blocks. Warp w owns tokens w and w + 8, lane l rows 2 l and 2 l + 1. One
// barrier a row block: sums alternate between two buffers.
template <int kTiles>
class BlockSums {
 public:
  __device__ BlockSums(const SbmmLaunch& params, const SbmmDeviceTask& task, float* sums,
                       int first_token, int num_tokens, int first_block, int warp, int lane)
      : dtype_(params.y_dtype),
        y_(static_cast<unsigned char*>(params.y)),
        token_stride_(params.y_stride * kWarps),
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
    for (int n = 0; n < kTurns; ++n) {
      if (warp_ + n * kWarps >= num_tokens_) continue;
      y_before_[n] = load_output(place(n), dtype_ == DType::kFloat32);
    }
  }

  // Writes the row block at hand, and goes on to the next. acc[r][n][t]: row 16 r + 8 t + q of the
  // warp's 32, token 4 n + c.
  __device__ __forceinline__ void finish(const float (&acc)[2][kTiles][2]) {
    const int buffer = buffer_ * (kColumnParts * num_tokens_ * kSumPitch);
    float* to = to_ + buffer;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int token = n * kTokenTile + lane_ % 4;
      if (token >= num_tokens_) continue;
      float* column = to + token * kSumPitch;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        column[16 * r] = acc[r][n][0];
        column[16 * r + 8] = acc[r][n][1];
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      if (warp_ + n * kWarps >= num_tokens_) continue;
      const float* from = from_ + buffer + n * kWarps * kSumPitch;
      float2 p[kColumnParts];
#pragma unroll
      for (int i = 0; i < kColumnParts; ++i) {
        p[i] = *reinterpret_cast<const float2*>(from + i * num_tokens_ * kSumPitch);
      }
      static_assert(kColumnParts == 4);
      const OutputPlace to_y = place(n);
      const float2 y = unpack_output(y_before_[n], to_y.is_vector, dtype_);
      store_output(to_y, dtype_,
                   {y.x + ((p[0].x + p[1].x) + (p[2].x + p[3].x)),
                    y.y + ((p[0].y + p[1].y) + (p[2].y + p[3].y))});
    }
    buffer_ ^= 1;
    offset_ += kRecordRows;
    rows_left_ -= kRecordRows;
  }

 private:
  static constexpr int kTurns = (kTiles * kTokenTile + kWarps - 1) / kWarps;

  __device__ __forceinline__ OutputPlace place(int n) const {
    const int size = dtype_ == DType::kFloat32 ? 4 : 2;
    OutputPlace out;
    out.y = y_ + (offset_ + n * token_stride_) * size;
    // Two comparisons, not one clamped count: of a clamp compared with 2, ptxas 13.0 made a
    // predicate that held for no rows too, and a lane stored the rows of another task.
    out.has_first = rows_left_ > 0;
    out.has_second = rows_left_ > 1;
    out.is_vector = out.has_second && reinterpret_cast<std::uintptr_t>(out.y) % (2 * size) == 0;
    return out;
  }

  DType dtype_;
  unsigned char* y_;
  std::int64_t token_stride_, offset_;
  const float* from_;
  float* to_;
  int rows_left_, num_tokens_, warp_, lane_, buffer_;
  uint2 y_before_[kTurns] = {};
};

}  // namespace deltazip::cuda
