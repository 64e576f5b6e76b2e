#pragma once

// What decode and prefill share: the way to the keys through the block table, and one warp's
// online softmax over a tile of keys (FlashAttention-2: Dao, 2023).

#include <cstdint>

#include "backend/cuda/kernels/device/cp_async.cuh"
#include "backend/cuda/kernels/device/ldmatrix.cuh"
#include "backend/cuda/kernels/device/mma.cuh"
#include "backend/cuda/kernels/paged_attention/config.h"
#include "backend/cuda/kernels/paged_attention/paged_attention.h"
#include "backend/cuda/kernels/paged_attention/plan.h"

namespace deltazip::cuda {

inline constexpr float kLog2E = 1.4426950408889634F;
// A row's sums are scaled anew only when its largest weight has grown past 2^8: weights up to there
// are as exact in 16 bits as those below 1, and most tiles then need no scaling.
inline constexpr float kMostGrowth = 8.0F;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xFF800000); }

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// A maximum to subtract: a row that has seen no key yet must not give inf - inf.
__device__ __forceinline__ float finite_or_zero(float maximum) {
  return maximum == minus_infinity() ? 0.0F : maximum;
}

__device__ __forceinline__ AttentionItem load_item(const std::int32_t* plan, int index) {
  const int4* from = reinterpret_cast<const int4*>(plan + sizeof(AttentionPlanHeader) / 4) +
                     static_cast<std::int64_t>(index) * (sizeof(AttentionItem) / 16);
  const int4 a = __ldg(from), b = __ldg(from + 1), c = __ldg(from + 2);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
}

// Finds cached rows. Lane l knows where the l-th group of eight keys of a window of 256 lies, and
// of the next window too, so that the block table's latency is paid once an item.
class GroupRows {
 public:
  __device__ GroupRows(const PagedAttentionArgs& args, const AttentionItem& item, int kv_head)
      : blocks_(args.plan + item.block_offset),
        block_size_(args.block_size),
        num_kv_heads_(args.num_kv_heads),
        kv_head_(kv_head),
        key_(item.key_begin + static_cast<int>(threadIdx.x % 32) * kGroupKeys),
        key_end_(item.key_end) {
    row_ = look_up(key_);
    next_row_ = look_up(key_ + kWindowKeys);
  }

  // The row of [num_blocks * num_kv_heads * block_size, head_dim] of the first key of group `group`
  // of the item. Same for the warp; groups come in ascending order and skip no window.
  __device__ int operator()(int group) {
    constexpr int kWindowGroups = kWindowKeys / kGroupKeys;
    if (group / kWindowGroups != window_) {
      ++window_;
      key_ += kWindowKeys;
      row_ = next_row_;
      next_row_ = look_up(key_ + kWindowKeys);
    }
    return __shfl_sync(kAllLanes, row_, group % kWindowGroups);
  }

 private:
  __device__ int look_up(int key) const {
    if (key >= key_end_) return 0;
    const int block = key / block_size_;
    return (__ldg(blocks_ + block) * num_kv_heads_ + kv_head_) * block_size_ + key -
           block * block_size_;
  }

  const std::int32_t* blocks_;
  int block_size_, num_kv_heads_, kv_head_;
  int key_, key_end_;  // key_: of this lane's group in the present window
  int window_ = 0;
  int row_, next_row_;
};

// One warp copies eight neighbouring rows; rows from num_valid on become zeros, since 0 * NaN of
// an unwritten slot would not be 0.
template <typename T, int kHeadDim>
__device__ __forceinline__ void copy_group(std::uint32_t smem, const void* cache, int row,
                                           int num_valid) {
  constexpr int kChunks = kHeadDim / 8;
  static_assert(kGroupKeys * kChunks % 32 == 0);
  const T* from = static_cast<const T*>(cache) + static_cast<std::int64_t>(row) * kHeadDim;
#pragma unroll
  for (int i = 0; i < kGroupKeys * kChunks / 32; ++i) {
    const int index = i * 32 + static_cast<int>(threadIdx.x % 32);
    const int key = index / kChunks, chunk = index % kChunks;
    cp_async_16(smem + key * kRowBytes<kHeadDim> + chunk * 16, from + index * 8, key < num_valid);
  }
}

template <int kRows, int kTiles>
__device__ __forceinline__ void set_zero(float (&tiles)[kRows][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) tiles[m][n][e] = 0.0F;
    }
  }
}

// The running softmax of 16 * kMmaRows rows. Lane 4r + c has rows r and r + 8 of each sixteen,
// columns 2c and 2c + 1 of each eight, and its own share of the weights' sum.
template <int kHeadDim, int kMmaRows>
struct SoftmaxState {
  float sums[kMmaRows][kHeadDim / 8][4];
  float maximum[kMmaRows][2];  // what weights refer to: a score before scaling, see kMostGrowth
  float weight[kMmaRows][2];

  __device__ void reset() {
    set_zero(sums);
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        maximum[m][h] = minus_infinity();
        weight[m][h] = 0.0F;
      }
    }
  }

  __device__ void sum_weights() {
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weight[m][h] += __shfl_xor_sync(kAllLanes, weight[m][h], 1);
        weight[m][h] += __shfl_xor_sync(kAllLanes, weight[m][h], 2);
      }
    }
  }
};

// Takes kKeys keys and values from shared memory. Row h of each sixteen sees keys below
// limits[m][h]; key0 is the first key's position. load_query(k, q) gives columns 16k.. of the
// queries as operands.
template <typename T, int kHeadDim, int kKeys, int kMmaRows, typename LoadQuery>
__device__ __forceinline__ void attend_tile(SoftmaxState<kHeadDim, kMmaRows>& state,
                                            LoadQuery&& load_query, std::uint32_t keys,
                                            std::uint32_t values, int key0, bool is_masked,
                                            const int (&limits)[kMmaRows][2], float scale_log2) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float scores[kMmaRows][kKeys / 8][4];
  set_zero(scores);
  // Matrices of an x4: keys 0-7 and columns 0-7, 0-7 and 8-15, then keys 8-15 likewise.
  const std::uint32_t key_address =
      keys + (lane / 16 * 8 + lane % 8) * kRowBytes<kHeadDim> + lane / 8 % 2 * 16;
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    std::uint32_t q[kMmaRows][4];
    load_query(k, q);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      std::uint32_t b[4];
      ldmatrix_x4(b, key_address + n * 16 * kRowBytes<kHeadDim> + k * 32);
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        mma_m16n8k16<T>(scores[m][2 * n], q[m], b[0], b[1]);
        mma_m16n8k16<T>(scores[m][2 * n + 1], q[m], b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kMmaRows; ++m) {
    if (is_masked) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = key0 + n * 8 + lane % 4 * 2 + e % 2;
          if (key >= limits[m][e / 2]) scores[m][n][e] = minus_infinity();
        }
      }
    }
    float correction[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float maximum = state.maximum[m][h];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        maximum = fmaxf(maximum, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
      // Row by row, whatever the warp's other rows do; from -inf, growth is inf or, to -inf, NaN.
      const float growth = (maximum - state.maximum[m][h]) * scale_log2;
      correction[h] = growth > kMostGrowth ? exp2_approx(-growth) : 1.0F;
      if (growth > kMostGrowth) state.maximum[m][h] = maximum;
      const float shift = finite_or_zero(state.maximum[m][h]) * scale_log2;
      float weight = 0.0F;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          scores[m][n][e] = exp2_approx(scores[m][n][e] * scale_log2 - shift);
          weight += scores[m][n][e];
        }
      }
      state.weight[m][h] = state.weight[m][h] * correction[h] + weight;
    }
    if (__any_sync(kAllLanes, correction[0] != 1.0F || correction[1] != 1.0F)) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state.sums[m][d][e] *= correction[e / 2];
      }
    }
  }

  // Transposed: keys 0-7 and columns 0-7, keys 8-15, then columns 8-15 likewise.
  const std::uint32_t value_address = values + lane % 16 * kRowBytes<kHeadDim> + lane / 16 * 16;
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    // Two neighbouring score tiles are, element for element, one operand of 16 keys.
    std::uint32_t a[kMmaRows][4];
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      a[m][0] = pack_pair<T>(scores[m][2 * n][0], scores[m][2 * n][1]);
      a[m][1] = pack_pair<T>(scores[m][2 * n][2], scores[m][2 * n][3]);
      a[m][2] = pack_pair<T>(scores[m][2 * n + 1][0], scores[m][2 * n + 1][1]);
      a[m][3] = pack_pair<T>(scores[m][2 * n + 1][2], scores[m][2 * n + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      std::uint32_t b[4];
      ldmatrix_x4_trans(b, value_address + n * 16 * kRowBytes<kHeadDim> + d * 32);
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        mma_m16n8k16<T>(state.sums[m][2 * d], a[m], b[0], b[1]);
        mma_m16n8k16<T>(state.sums[m][2 * d + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// First element of packed row p's query (columns = all of qkv's) or result (of out's).
__device__ __forceinline__ std::int64_t packed_element(const PagedAttentionArgs& args,
                                                       const AttentionItem& item, int kv_head,
                                                       int packed, int num_row_heads,
                                                       int head_dim) {
  const int group = args.num_heads / args.num_kv_heads;
  const int query = packed / group;
  const std::int64_t row = item.first_row + query;
  return (row * num_row_heads + kv_head * group + packed - query * group) * head_dim;
}

}  // namespace deltazip::cuda
