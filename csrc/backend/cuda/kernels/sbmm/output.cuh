#pragma once

// From the warps' sums of a row block to y. The order of additions is fixed by the matrix alone:
// within a column part its records of a span, then spans from the first on; then the parts,
// ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)); then y.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "backend/cuda/kernels/device/mbarrier.cuh"
#include "backend/cuda/kernels/sbmm/config.h"
#include "backend/cuda/kernels/sbmm/sbmm.h"

namespace deltazip::cuda {

// Where the rows 2 lane and 2 lane + 1 of a row block lie in y, for one token. A lane stores its
// own rows only: what follows the last belongs to another task, and may have grown since it was
// read.
struct OutputPlace {
  void* y;
  bool has_first, has_second;
  bool is_vector;  // both in one aligned access
};

template <typename T>
__device__ __forceinline__ float2 load_output(const OutputPlace& place, bool is_float) {
  float2 value{0.0F, 0.0F};
  if (is_float) {
    const auto* y = static_cast<const float*>(place.y);
    if (place.is_vector) return *reinterpret_cast<const float2*>(y);
    if (place.has_first) value.x = y[0];
    if (place.has_second) value.y = y[1];
  } else {
    const auto* y = static_cast<const T*>(place.y);
    if (place.is_vector) {
      if constexpr (std::is_same_v<T, __half>) {
        return __half22float2(*reinterpret_cast<const __half2*>(y));
      } else {
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(y));
      }
    }
    if (place.has_first) value.x = static_cast<float>(y[0]);
    if (place.has_second) value.y = static_cast<float>(y[1]);
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

// The sum of one row block at a time, one behind. Warp w owns token w, lane l rows 2 l and 2 l + 1.
// A row block that this CTA has whole goes through shared memory to y; of others every span of
// every part goes to scratch, and whoever comes last, counted per token, adds up.
template <typename T>
class BlockSums {
 public:
  __device__ BlockSums(const SbmmLaunch& params, std::uint32_t barriers, float* sums,
                       int sum_tokens, int warp, int lane, int num_blocks)
      : params_(params),
        barriers_(barriers),
        sums_(sums),
        part_floats_(sum_tokens * kSumPitch),
        warp_(warp),
        lane_(lane),
        count_(num_blocks) {}

  __device__ int num_blocks() const { return count_; }

  // [column part][token][64 rows]. To be called when the row block before is finished: then no
  // warp still reads what this overwrites.
  template <int kTiles>
  __device__ __forceinline__ void put(const float (&total)[2][kTiles][4], int num_tokens) {
    store(buffer() + warp_ / kRowPairs * part_floats_, kSumPitch, total, num_tokens);
  }
  // Scratch of a slot: [span][column part][token][64 rows].
  template <int kTiles>
  __device__ __forceinline__ void put_span(float* slot, int span, int piece_tokens,
                                           const float (&sum)[2][kTiles][4], int num_tokens) {
    const std::int64_t part = span * kColumnParts + warp_ / kRowPairs;
    store(slot + part * (piece_tokens * kRecordRows), kRecordRows, sum, num_tokens);
  }

  // All of the warp's put() or put_span() of a row block is done.
  __device__ __forceinline__ void hand_over(const SbmmDeviceTask& task, int first_token,
                                            int num_tokens, int row_block, int num_spans, int slot,
                                            float* slot_scratch) {
    is_whole_ = num_spans == task.spans;
    if (!is_whole_) __threadfence();
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(barriers_ + 8 * (count_ & 1));
    is_pending_ = true;
    is_mine_ = warp_ < num_tokens;
    if (!is_mine_) return;
    const int row = row_block * kRecordRows + 2 * lane_;
    // Two comparisons: of max(0, min(2, rows - row)) == 2 ptxas 13.0 makes a VIMNMX.RELU, by whose
    // predicate lanes with no row left stored too.
    place_.has_first = row < task.rows;
    place_.has_second = row + 1 < task.rows;
    const std::int64_t y_row = task.first_row + first_token + warp_;
    const std::int64_t offset = y_row * params_.y_stride + task.out_offset + row;
    const int size = is_float() ? 4 : 2;
    place_.y = static_cast<unsigned char*>(params_.y) + offset * size;
    place_.is_vector =
        place_.has_second && reinterpret_cast<std::uintptr_t>(place_.y) % (2 * size) == 0;
    if (is_whole_) {
      y_before_ = load_output<T>(place_, is_float());  // asked for a row block before it is needed
    } else {
      scratch_ = slot_scratch + warp_ * kRecordRows + 2 * lane_;
      counter_ = params_.counters + slot * kPassTokens + warp_;
      num_spans_ = num_spans;
      all_spans_ = task.spans;
      part_stride_ = task.piece_tokens * kRecordRows;
    }
  }

  __device__ __forceinline__ void finish_pending() {
    if (!is_pending_) return;
    mbarrier_wait(barriers_ + 8 * (count_ & 1), count_ >> 1 & 1);
    if (is_mine_ && is_whole_) {
      const float* from = buffer() + warp_ * kSumPitch + 2 * lane_;
      float2 parts[kColumnParts];
#pragma unroll
      for (int p = 0; p < kColumnParts; ++p) {
        parts[p] = *reinterpret_cast<const float2*>(from + p * part_floats_);
      }
      add_to_output(parts, y_before_);
    } else if (is_mine_) {
      finish_shared();
    }
    ++count_;
    is_pending_ = false;
  }

 private:
  __device__ __forceinline__ float* buffer() const {
    return sums_ + (count_ & 1) * (kColumnParts * part_floats_);
  }
  __device__ __forceinline__ bool is_float() const { return params_.y_dtype == DType::kFloat32; }

  // Registers of mma to [token][64 rows].
  template <int kTiles>
  __device__ __forceinline__ void store(float* part, int pitch, const float (&sum)[2][kTiles][4],
                                        int num_tokens) {
    float* to = part + warp_ % kRowPairs * 32 + lane_ / 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = n * kTokenTile + lane_ % 4 * 2 + i;
        if (token >= num_tokens) continue;
        float* column = to + token * pitch;
        column[0] = sum[0][n][i];
        column[8] = sum[0][n][2 + i];
        column[16] = sum[1][n][i];
        column[24] = sum[1][n][2 + i];
      }
    }
  }

  __device__ __forceinline__ void add_to_output(const float2 (&p)[kColumnParts], float2 y) {
    static_assert(kColumnParts == 8);
    const float x =
        ((p[0].x + p[1].x) + (p[2].x + p[3].x)) + ((p[4].x + p[5].x) + (p[6].x + p[7].x));
    const float z =
        ((p[0].y + p[1].y) + (p[2].y + p[3].y)) + ((p[4].y + p[5].y) + (p[6].y + p[7].y));
    store_output<T>(place_, is_float(), {y.x + x, y.y + z});
  }

  __device__ __forceinline__ void finish_shared() {
    __threadfence();
    int before = 0;
    if (lane_ == 0) before = atomicAdd(counter_, num_spans_);
    before = __shfl_sync(0xFFFFFFFFu, before, 0);
    if (before + num_spans_ != all_spans_) return;
    __threadfence();
    const float2 y = load_output<T>(place_, is_float());
    float2 parts[kColumnParts] = {};
    const float* from = scratch_;
#pragma unroll 2
    for (int span = 0; span < all_spans_; ++span) {
#pragma unroll
      for (int p = 0; p < kColumnParts; ++p) {
        const float2 next = __ldcg(reinterpret_cast<const float2*>(from));
        parts[p].x += next.x;
        parts[p].y += next.y;
        from += part_stride_;
      }
    }
    add_to_output(parts, y);
    if (lane_ == 0) *counter_ = 0;  // ready for the next launch
  }

  const SbmmLaunch& params_;
  std::uint32_t barriers_;
  float* sums_;
  int part_floats_;  // the same for all tasks of a launch: the other buffer is being read
  int warp_, lane_;
  int count_;  // row blocks finished
  bool is_pending_ = false;
  // Of the pending row block:
  bool is_mine_ = false, is_whole_ = false;
  OutputPlace place_{};
  float2 y_before_{};
  float* scratch_ = nullptr;
  std::int32_t* counter_ = nullptr;
  int num_spans_ = 0, all_spans_ = 0, part_stride_ = 0;
};

}  // namespace deltazip::cuda
