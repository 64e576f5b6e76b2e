#pragma once

#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/smem.cuh"
#include "backend/cuda/kernels/paged_attention/tile.cuh"

namespace deltazip::cuda {

// What a warp, or a chunk, contributes to one row.
struct RowShare {
  float maximum, weight;
};

__device__ __forceinline__ float share_factor(float maximum, float overall, float scale_log2) {
  return exp2_approx((maximum - finite_or_zero(overall)) * scale_log2);
}

template <typename T>
__device__ __forceinline__ void store_four(T* to, float4 v) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack_pair<T>(v.x, v.y), pack_pair<T>(v.z, v.w));
}

__device__ __forceinline__ void add_scaled(float4& sum, float4 v, float factor) {
  sum.x += v.x * factor;
  sum.y += v.y * factor;
  sum.z += v.z * factor;
  sum.w += v.w * factor;
}

__device__ __forceinline__ float4 scaled(float4 v, float factor) {
  return make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
}

// Row of the partial results of local row 0; rows of one chunk lie together.
__device__ __forceinline__ std::int64_t partial_row(const AttentionItem& item, int kv_head,
                                                    int chunk) {
  return item.partial +
         (static_cast<std::int64_t>(kv_head) * item.num_chunks + chunk) * item.num_packed;
}

// All chunks of a tile are there: adds them in order.
template <typename T, int kHeadDim>
__device__ void merge_chunks(const PagedAttentionArgs& args, const AttentionItem& item,
                             int kv_head) {
  constexpr int kQuads = kHeadDim / 4;
  const float scale_log2 = args.scale * kLog2E;
  const std::int64_t first = partial_row(item, kv_head, 0);
  const auto* softmax = reinterpret_cast<const float2*>(args.partial_softmax) + first;
  const auto* sums = reinterpret_cast<const float4*>(args.partial_sums) + first * kQuads;
  for (int i = static_cast<int>(threadIdx.x); i < item.num_packed * kQuads;
       i += static_cast<int>(blockDim.x)) {
    const int row = i / kQuads, quad = i % kQuads;
    float overall = minus_infinity();
#pragma unroll 8
    for (int c = 0; c < item.num_chunks; ++c) {
      overall = fmaxf(overall, __ldcg(softmax + c * item.num_packed + row).x);
    }
    float weight = 0.0F;
    float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll 8
    for (int c = 0; c < item.num_chunks; ++c) {
      const int local = c * item.num_packed + row;
      const float2 share = __ldcg(softmax + local);
      const float factor = share_factor(share.x, overall, scale_log2);
      weight += share.y * factor;
      add_scaled(sum, __ldcg(sums + static_cast<std::int64_t>(local) * kQuads + quad), factor);
    }
    T* to = static_cast<T*>(args.out) +
            packed_element(args, item, kv_head, item.first_packed + row, args.num_heads, kHeadDim);
    store_four(to + quad * 4, scaled(sum, 1.0F / weight));
  }
}

// The warps' shares become the item's: the result, or one chunk's partial result.
template <typename T, int kHeadDim>
__device__ void merge_warps(const PagedAttentionArgs& args, const AttentionItem& item, int kv_head,
                            const float* sums, const RowShare* shares) {
  using Config = DecodeConfig<kHeadDim>;
  constexpr int kQuads = kHeadDim / 4;
  const float scale_log2 = args.scale * kLog2E;
  for (int i = static_cast<int>(threadIdx.x); i < item.num_packed * kQuads; i += Config::kThreads) {
    const int row = i / kQuads, quad = i % kQuads;
    float overall = minus_infinity();
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
      overall = fmaxf(overall, shares[w * kDecodeRows + row].maximum);
    }
    float weight = 0.0F;
    float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
      const RowShare share = shares[w * kDecodeRows + row];
      const float factor = share_factor(share.maximum, overall, scale_log2);
      weight += share.weight * factor;
      const float* from = sums + (w * kDecodeRows + row) * Config::kSumFloats + quad * 4;
      add_scaled(sum, *reinterpret_cast<const float4*>(from), factor);
    }
    if (item.num_chunks == 1) {
      T* to =
          static_cast<T*>(args.out) +
          packed_element(args, item, kv_head, item.first_packed + row, args.num_heads, kHeadDim);
      store_four(to + quad * 4, scaled(sum, 1.0F / weight));
    } else {
      const std::int64_t to = partial_row(item, kv_head, item.chunk) + row;
      __stcg(reinterpret_cast<float4*>(args.partial_sums) + to * kQuads + quad, sum);
      if (quad == 0) {
        __stcg(reinterpret_cast<float2*>(args.partial_softmax) + to, make_float2(overall, weight));
      }
    }
  }
}

// Queries of up to 16 packed rows straight from global memory, as the mma's first operand.
template <typename T, int kHeadDim>
__device__ __forceinline__ void load_queries(std::uint32_t (&q)[kHeadDim / 16][4],
                                             const PagedAttentionArgs& args,
                                             const AttentionItem& item, int kv_head) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int num_row_heads = args.num_heads + 2 * args.num_kv_heads;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    const bool is_valid = row < item.num_packed;
    const int packed = item.first_packed + (is_valid ? row : 0);
    const auto* from = reinterpret_cast<const std::uint32_t*>(
        static_cast<const T*>(args.qkv) +
        packed_element(args, item, kv_head, packed, num_row_heads, kHeadDim));
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      q[k][h] = is_valid ? from[k * 8 + lane % 4] : 0u;
      q[k][h + 2] = is_valid ? from[k * 8 + 4 + lane % 4] : 0u;
    }
  }
}

// One warp's share of an item: every kWarps-th tile of 16 keys, through a ring of its own.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend_keys(SoftmaxState<kHeadDim, 1>& state,
                                            const PagedAttentionArgs& args,
                                            const AttentionItem& item, int kv_head, GroupRows& rows,
                                            std::uint32_t ring) {
  using Config = DecodeConfig<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int num_tiles = (item.key_end - item.key_begin + Config::kTileKeys - 1) / Config::kTileKeys;
  const int num_own = (num_tiles - warp + Config::kWarps - 1) / Config::kWarps;
  const auto fetch = [&](int turn) {
    if (turn < num_own) {
      const int tile = warp + turn * Config::kWarps;
      const std::uint32_t stage = ring + turn % Config::kStages * 2 * Config::kTileBytes;
      int row[2], num_valid[2];
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        row[g] = rows(tile * 2 + g);
        num_valid[g] = item.key_end - (item.key_begin + (tile * 2 + g) * kGroupKeys);
      }
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        copy_group<T, kHeadDim>(stage + g * kGroupKeys * kRowBytes<kHeadDim>, args.keys, row[g],
                                num_valid[g]);
      }
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        copy_group<T, kHeadDim>(stage + Config::kTileBytes + g * kGroupKeys * kRowBytes<kHeadDim>,
                                args.values, row[g], num_valid[g]);
      }
    }
    cp_async_commit();  // an empty group keeps the count
  };
#pragma unroll
  for (int turn = 0; turn < Config::kStages; ++turn) fetch(turn);

  std::uint32_t q[kHeadDim / 16][4];
  load_queries<T, kHeadDim>(q, args, item, kv_head);
  const int group = args.num_heads / args.num_kv_heads;
  int limits[1][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = min(lane / 4 + 8 * h, item.num_packed - 1);
    limits[0][h] = item.first_limit + (item.first_packed + row) / group;
  }
  const int least_limit = item.first_limit + item.first_packed / group;

  for (int turn = 0; turn < num_own; ++turn) {
    cp_async_wait<Config::kStages - 1>();
    __syncwarp();  // this turn's tile is there for all lanes
    const std::uint32_t stage = ring + turn % Config::kStages * 2 * Config::kTileBytes;
    const int key0 = item.key_begin + (warp + turn * Config::kWarps) * Config::kTileKeys;
    attend_tile<T, kHeadDim, Config::kTileKeys, 1>(
        state,
        [&](int k, std::uint32_t (&to)[1][4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[0][i] = q[k][i];
        },
        stage, stage + Config::kTileBytes, key0, key0 + Config::kTileKeys > least_limit, limits,
        args.scale * kLog2E);
    // Not a turn ahead into a spare stage: so, while a warp waits, its whole ring is under way.
    __syncwarp();
    fetch(turn + Config::kStages);
  }
}

// A persistent grid takes (item, KV head) pairs by stride. Memory-bound: with one query and one
// head a group fifteen rows of each mma are idle, at a twelfth of the tensor cores' time.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(DecodeConfig<kHeadDim>::kThreads,
                                  DecodeConfig<kHeadDim>::kCtasPerSm)
    paged_attention_decode(const PagedAttentionArgs args) {
  using Config = DecodeConfig<kHeadDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ bool is_last;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int num_units = __ldg(args.plan) * args.num_kv_heads;
  griddep_launch();

  for (int unit = static_cast<int>(blockIdx.x); unit < num_units;
       unit += static_cast<int>(gridDim.x)) {
    const AttentionItem item = load_item(args.plan, unit / args.num_kv_heads);
    const int kv_head = unit % args.num_kv_heads;
    GroupRows rows(args, item, kv_head);
    griddep_wait();  // no kernel writes the plan; after the first item this returns at once
    SoftmaxState<kHeadDim, 1> state;
    state.reset();
    attend_keys<T, kHeadDim>(state, args, item, kv_head, rows,
                             smem_address(shared) + warp * Config::kWarpBytes);
    state.sum_weights();

    __syncthreads();  // no warp needs its tiles any more
    auto* sums = reinterpret_cast<float*>(shared);
    auto* shares =
        reinterpret_cast<RowShare*>(sums + Config::kWarps * kDecodeRows * Config::kSumFloats);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      if (row >= item.num_packed) continue;
      float* to = sums + (warp * kDecodeRows + row) * Config::kSumFloats + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        *reinterpret_cast<float2*>(to + d * 8) =
            make_float2(state.sums[0][d][2 * h], state.sums[0][d][2 * h + 1]);
      }
      if (lane % 4 == 0) {
        shares[warp * kDecodeRows + row] = {state.maximum[0][h], state.weight[0][h]};
      }
    }
    __syncthreads();
    merge_warps<T, kHeadDim>(args, item, kv_head, sums, shares);

    if (item.num_chunks > 1) {
      __threadfence();  // this thread's partial results, before the count says so
      __syncthreads();
      if (threadIdx.x == 0) {
        std::uint32_t* counter = args.counters + item.counter + kv_head;
        is_last = atomicAdd(counter, 1u) + 1 == static_cast<std::uint32_t>(item.num_chunks);
        if (is_last) *counter = 0;
        __threadfence();
      }
      __syncthreads();
      if (is_last) merge_chunks<T, kHeadDim>(args, item, kv_head);
    }
    __syncthreads();  // the next item's tiles overwrite the sums
  }
  griddep_wait();  // a CTA without items must not end before what came before
}

}  // namespace deltazip::cuda
