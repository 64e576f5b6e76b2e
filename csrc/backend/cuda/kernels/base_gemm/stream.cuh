#pragma once

#include <cuda.h>

#include <cstdint>

#include "backend/cuda/kernels/base_gemm/config.h"
#include "backend/cuda/kernels/device/atomics.cuh"
#include "backend/cuda/kernels/device/bulk_copy.cuh"
#include "backend/cuda/kernels/device/ldmatrix.cuh"
#include "backend/cuda/kernels/device/mbarrier.cuh"
#include "backend/cuda/kernels/device/mma.cuh"
#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/smem.cuh"
#include "backend/cuda/kernels/device/tensor_map.cuh"
#include "backend/cuda/kernels/device/warp.cuh"

namespace deltazip::cuda::base_gemm {

struct StreamArgs {
  void* y;                  // [num_tokens, out_features]
  float4* partials;         // [2 * num_ctas][fragments of a block][consumers]
  std::uint32_t* counters;  // [warps of all blocks], zero between launches
  Schedule schedule;
  std::int32_t num_tokens, out_features;
  bool is_float32;  // y
};

// One stage: kBoxes boxes [kBlockRows, 64] of weights, then as many [kTokens, 64] of x.
template <int kTokens_, Form kForm>
struct StreamShape {
  static constexpr int kTokens = kTokens_;
  static constexpr int kBoxes = kUnitColumns / kBoxColumns;
  static constexpr int kWarps = kBlockRows / kWarpRows;
  static constexpr int kConsumers = 32 * kWarps;
  static constexpr int kUsedThreads = kConsumers + 32;  // and a producer
  static constexpr int kThreads = kForm == Form::kWide ? wide_threads(kTokens) : kUsedThreads;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kXBoxBytes = kTokens * kBoxRowBytes;
  static constexpr int kStageBytes = kStageWeightBytes + kBoxes * kXBoxBytes;
  static constexpr int kStages = ring_bytes(kForm) / kStageBytes;
  // Swizzled boxes stand on multiples of 1024 bytes; dynamic shared memory promises only 16.
  static constexpr int kSmemBytes =
      (kForm == Form::kDeep ? ring_bytes(kForm) : kStages * kStageBytes) + 1024;
  static_assert(kStages >= 2 && kTokens % 8 == 0);
};

// The 16-byte chunk of a row that 128-byte swizzle puts at another place.
__device__ __forceinline__ std::uint32_t swizzled(std::uint32_t row, std::uint32_t chunk) {
  return row * kBoxRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Where a unit's boxes begin.
template <typename Shape>
__device__ __forceinline__ int box_column(const Schedule& schedule, std::uint32_t unit, int box) {
  return (static_cast<int>(unit % schedule.units_per_block) * Shape::kBoxes + box) * kBoxColumns;
}
__device__ __forceinline__ int box_row(const Schedule& schedule, std::uint32_t unit) {
  return static_cast<int>(unit / schedule.units_per_block) * kBlockRows;
}

template <typename Shape>
__device__ __forceinline__ void produce(const CUtensorMap* weight_map, const CUtensorMap* x_map,
                                        const StreamArgs& args, std::uint32_t ring,
                                        std::uint32_t full, std::uint32_t empty,
                                        std::uint32_t first, std::uint32_t last) {
  const Schedule& schedule = args.schedule;
  const std::uint64_t once = policy_evict_first(), often = policy_evict_last();
  const auto fetch_weights = [&](std::uint32_t unit, std::uint32_t stage) {
    const std::uint32_t to = ring + stage * Shape::kStageBytes;
    mbarrier_arrive_expect_tx(full + 8 * stage, Shape::kStageBytes);
#pragma unroll
    for (int box = 0; box < Shape::kBoxes; ++box) {
      tensor_copy_2d(to + box * kBlockRows * kBoxRowBytes, weight_map,
                     box_column<Shape>(schedule, unit, box), box_row(schedule, unit),
                     full + 8 * stage, once);
    }
  };
  const auto fetch_x = [&](std::uint32_t unit, std::uint32_t stage) {
    const std::uint32_t to = ring + stage * Shape::kStageBytes + kStageWeightBytes;
#pragma unroll
    for (int box = 0; box < Shape::kBoxes; ++box) {
      tensor_copy_2d(to + box * Shape::kXBoxBytes, x_map, box_column<Shape>(schedule, unit, box), 0,
                     full + 8 * stage, often);
    }
  };

  // Weights do not depend on the kernel before: the first ring of them is fetched while it runs.
  const std::uint32_t early = min(last - first, static_cast<std::uint32_t>(Shape::kStages));
  for (std::uint32_t i = 0; i < early; ++i) fetch_weights(first + i, i);
  griddep_wait();
  for (std::uint32_t i = 0; i < early; ++i) fetch_x(first + i, i);

  std::uint32_t stage = 0, parity = 0;
  for (std::uint32_t unit = first + early; unit < last; ++unit) {
    mbarrier_wait(empty + 8 * stage, parity);
    fetch_weights(unit, stage);
    fetch_x(unit, stage);
    if (++stage == Shape::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// One stage's products, added to this warp's sums.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply_stage(float (&sums)[Shape::kTokenTiles][4],
                                               std::uint32_t stage, std::uint32_t warp) {
  const std::uint32_t lane = threadIdx.x & 31;
  const std::uint32_t a_row = (lane & 15), a_chunk = lane >> 4;
#pragma unroll
  for (int box = 0; box < Shape::kBoxes; ++box) {
    const std::uint32_t weights =
        stage + box * kBlockRows * kBoxRowBytes + warp * kWarpRows * kBoxRowBytes;
    const std::uint32_t x = stage + kStageWeightBytes + box * Shape::kXBoxBytes;
    const auto load_a = [&](std::uint32_t (&a)[4], int k16) {
      ldmatrix_x4(a, weights + swizzled(a_row, 2 * k16 + a_chunk));
    };
    if constexpr (Shape::kTokenTiles == 1) {
#pragma unroll
      for (int k32 = 0; k32 < 2; ++k32) {
        std::uint32_t b[4];
        ldmatrix_x4(b, x + swizzled(lane & 7, 4 * k32 + (lane >> 3)));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          std::uint32_t a[4];
          load_a(a, 2 * k32 + half);
          mma_m16n8k16<T>(sums[0], a, b[2 * half], b[2 * half + 1]);
        }
      }
    } else {
      const std::uint32_t b_row = (lane & 7) + ((lane >> 4) << 3), b_chunk = (lane >> 3) & 1;
#pragma unroll
      for (int k16 = 0; k16 < 4; ++k16) {
        std::uint32_t a[4];
        load_a(a, k16);
#pragma unroll
        for (int n = 0; n < Shape::kTokenTiles; n += 2) {
          std::uint32_t b[4];
          ldmatrix_x4(b, x + swizzled(8 * n + b_row, 2 * k16 + b_chunk));
          mma_m16n8k16<T>(sums[n], a, b[0], b[1]);
          mma_m16n8k16<T>(sums[n + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

// sums: lane 4q + c holds rows q and q + 8, tokens 2c and 2c + 1 of its 16 x 8 tile.
template <typename T>
__device__ __forceinline__ void store_tile(const StreamArgs& args, const float (&sums)[4], int row,
                                           int token) {
  const int lane = static_cast<int>(threadIdx.x & 31), q = lane >> 2, c = lane & 3;
  if (args.is_float32) {
    float* y = static_cast<float*>(args.y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + q + 8 * (i >> 1), t = token + 2 * c + (i & 1);
      if (r < args.out_features && t < args.num_tokens) {
        y[static_cast<std::int64_t>(t) * args.out_features + r] = sums[i];
      }
    }
    return;
  }
  T* y = static_cast<T*>(args.y);
  const int t = token + q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Transposed, a lane has two neighbours of one token's row.
    const std::uint32_t pair = transpose_8x8(pack_pair<T>(sums[2 * half], sums[2 * half + 1]));
    const int r = row + 8 * half + 2 * c;
    if (t >= args.num_tokens || r >= args.out_features) continue;
    T* to = y + static_cast<std::int64_t>(t) * args.out_features + r;
    if (args.out_features % 2 == 0) {
      *reinterpret_cast<std::uint32_t*>(to) = pair;
    } else {
      const T* values = reinterpret_cast<const T*>(&pair);
      to[0] = values[0];
      if (r + 1 < args.out_features) to[1] = values[1];
    }
  }
}

// Adds the parts of this warp's rows in a block that several CTAs share. True in the warp that
// comes last, which gets the sum of all parts in the order of the CTAs, whoever is last. Warps do
// not wait for each other: the whole way is what a launch ends with.
template <typename Shape>
__device__ __forceinline__ bool add_parts(float (&sums)[Shape::kTokenTiles][4],
                                          const StreamArgs& args, std::uint32_t block,
                                          bool begins_block) {
  constexpr int kPartSize = Shape::kTokenTiles * Shape::kConsumers;
  const Schedule& schedule = args.schedule;
  const std::uint32_t first_unit = block * schedule.units_per_block;
  const std::uint32_t first_cta = schedule.owner(first_unit);
  const std::uint32_t last_cta = schedule.owner(first_unit + schedule.units_per_block - 1);
  // A CTA shares at most two blocks: the one it begins in and the one it ends in.
  const auto part = [&](std::uint32_t cta, bool begins) {
    return args.partials + static_cast<std::size_t>(2 * cta + (begins ? 1 : 0)) * kPartSize +
           threadIdx.x;
  };
  float4* mine = part(blockIdx.x, begins_block);
#pragma unroll
  for (int i = 0; i < Shape::kTokenTiles; ++i) {
    const float (&s)[4] = sums[i];
    __stcg(mine + i * Shape::kConsumers, make_float4(s[0], s[1], s[2], s[3]));
  }
  __syncwarp();
  std::uint32_t arrived = 0;
  if ((threadIdx.x & 31) == 0) {
    std::uint32_t* counter = args.counters + block * Shape::kWarps + (threadIdx.x >> 5);
    arrived = add_acq_rel(counter, 1);
    if (arrived == last_cta - first_cta) *counter = 0;
  }
  arrived = __shfl_sync(0xFFFFFFFFU, arrived, 0);
  if (arrived != last_cta - first_cta) return false;

#pragma unroll
  for (int i = 0; i < Shape::kTokenTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = 0.0F;
  }
  // Several parts at once, or each would cost a whole trip to L2.
  constexpr int kAtOnce = 8 / Shape::kTokenTiles;
  for (std::uint32_t cta = first_cta; cta <= last_cta; cta += kAtOnce) {
    float4 parts[kAtOnce][Shape::kTokenTiles];
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      const bool is_part = cta + p <= last_cta;
      const float4* from = part(is_part ? cta + p : cta, cta + p == first_cta);
#pragma unroll
      for (int i = 0; i < Shape::kTokenTiles; ++i) {
        parts[p][i] = is_part ? __ldcg(from + i * Shape::kConsumers) : float4{};
      }
    }
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
#pragma unroll
      for (int i = 0; i < Shape::kTokenTiles; ++i) {
        sums[i][0] += parts[p][i].x;
        sums[i][1] += parts[p][i].y;
        sums[i][2] += parts[p][i].z;
        sums[i][3] += parts[p][i].w;
      }
    }
  }
  return true;
}

template <typename T, typename Shape>
__device__ __forceinline__ void consume(const StreamArgs& args, std::uint32_t ring,
                                        std::uint32_t full, std::uint32_t empty,
                                        std::uint32_t first, std::uint32_t last) {
  const std::uint32_t warp = threadIdx.x >> 5, units_per_block = args.schedule.units_per_block;
  std::uint32_t stage = 0, parity = 0;
  for (std::uint32_t unit = first; unit < last;) {
    const std::uint32_t block = unit / units_per_block;
    const std::uint32_t block_first = block * units_per_block;
    const std::uint32_t end = min(last, block_first + units_per_block);
    const bool begins_block = unit == block_first;
    const bool is_whole = begins_block && end == block_first + units_per_block;
    float sums[Shape::kTokenTiles][4] = {};
    for (; unit < end; ++unit) {
      mbarrier_wait(full + 8 * stage, parity);
      multiply_stage<T, Shape>(sums, ring + stage * Shape::kStageBytes, warp);
      __syncwarp();
      if ((threadIdx.x & 31) == 0) mbarrier_arrive(empty + 8 * stage);
      if (++stage == Shape::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    if (!is_whole && !add_parts<Shape>(sums, args, block, begins_block)) continue;
    const int row = static_cast<int>(block * kBlockRows + warp * kWarpRows);
#pragma unroll
    for (int n = 0; n < Shape::kTokenTiles; ++n) store_tile<T>(args, sums[n], row, 8 * n);
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    stream_gemm(const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ StreamArgs args) {
#if __CUDA_ARCH__ >= 900  // never launched on less, which has no copy engine
  extern __shared__ std::uint8_t smem[];
  __shared__ __align__(8) std::uint64_t full[Shape::kStages], empty[Shape::kStages];
  const std::uint32_t ring = (smem_address(smem) + 1023) & ~1023U;
  const std::uint32_t full_address = smem_address(full), empty_address = smem_address(empty);
  const std::uint32_t first = args.schedule.first_unit(blockIdx.x);
  const std::uint32_t last = args.schedule.first_unit(blockIdx.x + 1);
  // At once: what follows can but fill its rings until this kernel is done.
  griddep_launch();
  if (threadIdx.x == Shape::kConsumers) {
    prefetch_tensor_map(&weight_map);
    prefetch_tensor_map(&x_map);
    for (int i = 0; i < Shape::kStages; ++i) {
      mbarrier_init(full_address + 8 * i, 1);
      mbarrier_init(empty_address + 8 * i, Shape::kWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < Shape::kConsumers) {
    griddep_wait();
    consume<T, Shape>(args, ring, full_address, empty_address, first, last);
  } else if (threadIdx.x == Shape::kConsumers) {
    produce<Shape>(&weight_map, &x_map, args, ring, full_address, empty_address, first, last);
  }
  if constexpr (Shape::kThreads > Shape::kUsedThreads) __syncthreads();  // idle warps stay as long
#endif
}

}  // namespace deltazip::cuda::base_gemm
