#pragma once

// From the warps' partial sums of a segment to y. The order of additions is fixed by the matrix
// alone: column parts (0 + 1) + (2 + 3), then segments from the first on, then y.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "backend/cuda/kernels/device/mbarrier.cuh"
#include "backend/cuda/kernels/sbmm/config.h"
#include "backend/cuda/kernels/sbmm/sbmm.h"

namespace deltazip::cuda {

// Where the rows 2 lane and 2 lane + 1 of a row block lie in y, for one token.
struct OutputPlace {
  void* y;
  int num_rows;    // 0, 1 or 2 of them exist
  bool is_vector;  // both in one aligned access
};

template <typename T>
__device__ __forceinline__ float2 load_output(const OutputPlace& place, bool is_float) {
  float2 value{0.0F, 0.0F};
  if (is_float) {
    const auto* y = static_cast<const float*>(place.y);
    if (place.is_vector) return *reinterpret_cast<const float2*>(y);
    if (place.num_rows > 0) value.x = y[0];
    if (place.num_rows > 1) value.y = y[1];
  } else {
    const auto* y = static_cast<const T*>(place.y);
    if (place.is_vector) {
      if constexpr (std::is_same_v<T, __half>) {
        return __half22float2(*reinterpret_cast<const __half2*>(y));
      } else {
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(y));
      }
    }
    if (place.num_rows > 0) value.x = static_cast<float>(y[0]);
    if (place.num_rows > 1) value.y = static_cast<float>(y[1]);
  }
  return value;
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
    if (place.num_rows > 0) y[0] = value.x;
    if (place.num_rows > 1) y[1] = value.y;
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
    if (place.num_rows > 0) y[0] = static_cast<T>(value.x);
    if (place.num_rows > 1) y[1] = static_cast<T>(value.y);
  }
}

// The sum of one segment at a time, one behind. Warp w owns tokens w and w + 8 of a pass, lane l
// rows 2 l and 2 l + 1. A row block whose segments this CTA has all goes straight to y; otherwise
// each segment goes to scratch and whoever comes last, counted per row block and token, adds up.
template <typename T>
class SegmentSums {
 public:
  __device__ SegmentSums(const SbmmLaunch& params, std::uint32_t barriers, float* sums,
                         int sum_tiles, int warp, int lane)
      : params_(params),
        barriers_(barriers),
        sums_(sums),
        buffer_floats_(sum_tiles * (kColumnParts * kTokenTile * kSumPitch)),
        warp_(warp),
        lane_(lane) {}

  // Registers of mma into shared memory: [column part][token][64 rows]. To be called when the
  // segment before is finished: then no warp still reads what this overwrites.
  __device__ __forceinline__ void put(const SbmmDeviceTask& task, int first_token, int num_tokens,
                                      int row_block, int segment, bool is_whole,
                                      const float (&acc)[2][kMaxTiles][4]) {
    const int tiles = num_tokens > kTokenTile ? kMaxTiles : 1;
    float* to = buffer() + (warp_ / kRowPairs * tiles * kTokenTile) * kSumPitch +
                warp_ % kRowPairs * 32 + lane_ / 4;
#pragma unroll
    for (int n = 0; n < kMaxTiles; ++n) {
      if (n >= tiles) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = n * kTokenTile + lane_ % 4 * 2 + i;
        if (token >= num_tokens) continue;
        float* column = to + token * kSumPitch;
        column[0] = acc[0][n][i];
        column[8] = acc[0][n][2 + i];
        column[16] = acc[1][n][i];
        column[24] = acc[1][n][2 + i];
      }
    }
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(barriers_ + 8 * (count_ & 1));
    remember(task, first_token, num_tokens, row_block, segment, is_whole);
    is_pending_ = true;
  }

  __device__ __forceinline__ void finish_pending() {
    if (!is_pending_) return;
    mbarrier_wait(barriers_ + 8 * (count_ & 1), count_ >> 1 & 1);
#pragma unroll
    for (int n = 0; n < kMaxTiles; ++n) {
      const int token = n * kTokenTile + warp_;
      if (token < num_tokens_) finish_token(n, token);
    }
    ++count_;
    is_pending_ = false;
  }

 private:
  __device__ __forceinline__ float* buffer() const { return sums_ + (count_ & 1) * buffer_floats_; }

  __device__ __forceinline__ void remember(const SbmmDeviceTask& task, int first_token,
                                           int num_tokens, int row_block, int segment,
                                           bool is_whole) {
    num_tokens_ = min(num_tokens, kPassTokens);
    segment_ = segment;
    num_segments_ = task.segments;
    is_whole_ = is_whole;
    const std::int64_t block_offset =
        static_cast<std::int64_t>(row_block) * task.segments * task.num_rows + first_token;
    scratch_ = params_.scratch + task.scratch_offset + block_offset * kRecordRows;
    segment_stride_ = task.num_rows * kRecordRows;
    counter_ = params_.counters + task.counter_offset + row_block * task.num_rows + first_token;
    const int row = row_block * kRecordRows + 2 * lane_;
    rows_here_ = max(0, min(2, task.rows - row));
    const std::int64_t y_row = task.first_row + first_token;
    y_offset_ = y_row * params_.y_stride + task.out_offset + row;
    const int size = params_.y_dtype == DType::kFloat32 ? 4 : 2;
    is_vector_ = rows_here_ == 2 && y_offset_ % 2 == 0 && params_.y_stride % 2 == 0 &&
                 reinterpret_cast<std::uintptr_t>(params_.y) % (2 * size) == 0;
    // y is asked for a segment before it is needed.
    if (is_whole && segment + 1 == task.segments) {
#pragma unroll
      for (int n = 0; n < kMaxTiles; ++n) {
        const int token = n * kTokenTile + warp_;
        if (token < num_tokens_) y_before_[n] = load_output<T>(place(token), is_float());
      }
    }
  }

  __device__ __forceinline__ bool is_float() const { return params_.y_dtype == DType::kFloat32; }

  __device__ __forceinline__ OutputPlace place(int token) const {
    const std::int64_t offset = y_offset_ + token * params_.y_stride;
    return {static_cast<unsigned char*>(params_.y) + offset * (is_float() ? 4 : 2), rows_here_,
            is_vector_};
  }

  __device__ __forceinline__ void finish_token(int n, int token) {
    const int tiles = num_tokens_ > kTokenTile ? kMaxTiles : 1;
    const float* from = buffer() + token * kSumPitch + 2 * lane_;
    float2 parts[kColumnParts];
#pragma unroll
    for (int p = 0; p < kColumnParts; ++p) {
      parts[p] = *reinterpret_cast<const float2*>(from + p * tiles * kTokenTile * kSumPitch);
    }
    const float2 sum{(parts[0].x + parts[1].x) + (parts[2].x + parts[3].x),
                     (parts[0].y + parts[1].y) + (parts[2].y + parts[3].y)};
    if (is_whole_) {
      run_[n].x = segment_ == 0 ? sum.x : run_[n].x + sum.x;
      run_[n].y = segment_ == 0 ? sum.y : run_[n].y + sum.y;
      if (segment_ + 1 == num_segments_) {
        store_output<T>(place(token), is_float(),
                        {y_before_[n].x + run_[n].x, y_before_[n].y + run_[n].y});
      }
    } else {
      finish_shared(token, sum);
    }
  }

  __device__ __forceinline__ void finish_shared(int token, float2 sum) {
    float* mine = scratch_ + token * kRecordRows + 2 * lane_;
    __stcg(reinterpret_cast<float2*>(mine + static_cast<std::int64_t>(segment_) * segment_stride_),
           sum);
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane_ == 0) before = atomicAdd(counter_ + token, 1);
    before = __shfl_sync(0xFFFFFFFFu, before, 0);
    if (before + 1 != num_segments_) return;
    __threadfence();
    float2 total = __ldcg(reinterpret_cast<const float2*>(mine));
#pragma unroll 4
    for (int segment = 1; segment < num_segments_; ++segment) {
      const float2 next = __ldcg(reinterpret_cast<const float2*>(
          mine + static_cast<std::int64_t>(segment) * segment_stride_));
      total.x += next.x;
      total.y += next.y;
    }
    const float2 y = load_output<T>(place(token), is_float());
    store_output<T>(place(token), is_float(), {y.x + total.x, y.y + total.y});
    if (lane_ == 0) counter_[token] = 0;  // ready for the next launch
  }

  const SbmmLaunch& params_;
  std::uint32_t barriers_;
  float* sums_;
  int buffer_floats_;  // the same for all segments of a launch: the other buffer is being read
  int warp_, lane_;
  int count_ = 0;  // segments finished
  bool is_pending_ = false;
  // Of the pending segment:
  int num_tokens_ = 0, segment_ = 0, num_segments_ = 0, segment_stride_ = 0, rows_here_ = 0;
  bool is_whole_ = false, is_vector_ = false;
  std::int64_t y_offset_ = 0;
  float* scratch_ = nullptr;
  std::int32_t* counter_ = nullptr;
  float2 y_before_[kMaxTiles] = {};
  float2 run_[kMaxTiles] = {};
};

}  // namespace deltazip::cuda
