#pragma once

// Sums, maxima and searches over the cluster that holds one row, or the one CTA that does.

#include <cstdint>

#include "backend/cuda/kernels/device/cluster.cuh"
#include "backend/cuda/kernels/sample/config.h"

namespace deltazip::cuda::sampling {

using u32 = std::uint32_t;
using u64 = unsigned long long;

constexpr int kMaxReduced = kWays - 1;  // values that one reduction takes

struct Sum {
  // Below 2^54: two sums of 27 bits over 32 lanes stay within 32.
  static __device__ __forceinline__ u64 of_warp(u64 value) {
    constexpr int kBits = 27;
    const u32 low = __reduce_add_sync(~0U, static_cast<u32>(value) & ((1U << kBits) - 1));
    const u32 high = __reduce_add_sync(~0U, static_cast<u32>(value >> kBits));
    return (static_cast<u64>(high) << kBits) + low;
  }
  static __device__ __forceinline__ u64 of(u64 a, u64 b) { return a + b; }
};

struct Max {
  static __device__ __forceinline__ u64 of_warp(u64 value) {
    const u32 high = static_cast<u32>(value >> 32);
    const u32 top = __reduce_max_sync(~0U, high);
    const u32 low = __reduce_max_sync(~0U, high == top ? static_cast<u32>(value) : 0U);
    return (static_cast<u64>(top) << 32) | low;
  }
  static __device__ __forceinline__ u64 of(u64 a, u64 b) { return a > b ? a : b; }
};

struct Exchange {
  u64 warps[kWarps][kMaxReduced];
  // What each CTA of the cluster sent. By turns, so that nobody overwrites what a slower CTA reads:
  // who is two reductions ahead has passed a barrier at which the slower one arrived.
  u64 ctas[2][kRowCtas][kMaxReduced];
};

class Cluster {
 public:
  // Nothing may be sent before all CTAs have begun: the caller has called arrive() early, and
  // wait() before the first reduction.
  __device__ explicit Cluster(Exchange& exchange)
      : exchange_(exchange),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32) {
    if constexpr (kRowCtas > 1) rank_ = cluster_rank();
  }
  __device__ __forceinline__ u32 rank() const { return rank_; }

  // A barrier of all threads in two halves.
  static __device__ __forceinline__ void arrive() {
    if constexpr (kRowCtas > 1) cluster_arrive();
  }
  static __device__ __forceinline__ void wait() {
    if constexpr (kRowCtas > 1) {
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  // The place of `pointer`, into this CTA's shared memory, in the CTA of that rank.
  template <typename V>
  static __device__ __forceinline__ V* at_cta(V* pointer, u32 rank) {
    if constexpr (kRowCtas > 1) return in_cta(pointer, rank);
    return pointer;
  }

  // Each value combined over all threads of the cluster, given to all of them. Orders memory like a
  // barrier of the cluster.
  template <typename Op, int kCount>
  __device__ __forceinline__ void reduce(u64 (&values)[kCount]) {
    static_assert(kCount <= kMaxReduced && kCount * kRowCtas <= kThreads);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const u64 value = Op::of_warp(values[j]);
      if (lane_ == 0) exchange_.warps[warp_][j] = value;
    }
    __syncthreads();
    if (threadIdx.x < kCount * kRowCtas) {
      const int j = static_cast<int>(threadIdx.x) % kCount;
      u64 value = exchange_.warps[0][j];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) value = Op::of(value, exchange_.warps[warp][j]);
      *at_cta(&exchange_.ctas[turn_][rank_][j], threadIdx.x / kCount) = value;
    }
    __syncwarp();
    arrive();
    wait();
    u64 value = 0;
    if (lane_ < kCount) {
#pragma unroll
      for (int cta = 0; cta < kRowCtas; ++cta) {
        value = Op::of(value, exchange_.ctas[turn_][cta][lane_]);
      }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = __shfl_sync(~0U, value, j);
    turn_ ^= 1;
  }

  struct Found {
    u32 bound;
    u64 above;  // weight of the keys greater than bound
  };
  // The largest bound in [low, high) such that the keys >= bound weigh `need` or more. That those
  // >= low do is taken for granted; no key is >= high. for_each calls its argument with (key,
  // get_weight) for every key of this thread.
  template <typename ForEach>
  __device__ __forceinline__ Found search(u32 low, u32 high, u64 need, const ForEach& for_each) {
    u64 above = 0;
    while (high - low > 1) {
      const u32 width = high - low, step = (width + kWays - 1) / kWays;
      u64 weights[kMaxReduced] = {};
      for_each([&](u32 key, auto get_weight) {
        if (key - low >= width) return;  // lighter than all bounds, or in `above` already
        const u64 weight = get_weight();
#pragma unroll
        for (int j = 0; j < kMaxReduced; ++j) {
          if (key - low >= (j + 1) * step) weights[j] += weight;
        }
      });
      reduce<Sum>(weights);
      u32 new_low = low, new_high = high;
      u64 new_above = above;
#pragma unroll
      for (int j = 0; j < kMaxReduced; ++j) {
        const u32 offset = (j + 1) * step;
        if (offset >= width || new_high != high) continue;
        if (above + weights[j] >= need) {
          new_low = low + offset;
        } else {
          new_high = low + offset;
          new_above = above + weights[j];
        }
      }
      low = new_low;
      high = new_high;
      above = new_above;
    }
    return {low, above};
  }

 private:
  Exchange& exchange_;
  u32 rank_ = 0;
  int warp_, lane_;
  int turn_ = 0;
};

}  // namespace deltazip::cuda::sampling
