#pragma once

#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/smem.cuh"
#include "backend/cuda/kernels/paged_attention/tile.cuh"

namespace deltazip::cuda {

// All warps copy the tile's queries; rows past the last become zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void copy_queries(std::uint32_t smem, const PagedAttentionArgs& args,
                                             const AttentionItem& item, int kv_head) {
  using Config = PrefillConfig<kHeadDim>;
  constexpr int kChunks = kHeadDim / 8;
  static_assert(Config::kRows * kChunks % Config::kThreads == 0);
  const int num_row_heads = args.num_heads + 2 * args.num_kv_heads;
#pragma unroll 4
  for (int i = 0; i < Config::kRows * kChunks / Config::kThreads; ++i) {
    const int index = i * Config::kThreads + static_cast<int>(threadIdx.x);
    const int row = index / kChunks, chunk = index % kChunks;
    const bool is_valid = row < item.num_packed;
    const int packed = item.first_packed + (is_valid ? row : 0);
    const T* from = static_cast<const T*>(args.qkv) +
                    packed_element(args, item, kv_head, packed, num_row_heads, kHeadDim);
    cp_async_16(smem + row * kRowBytes<kHeadDim> + chunk * 16, from + chunk * 8, is_valid);
  }
}

// The warp's rows through its own part of the queries' tile, so that stores are of 16 bytes.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_results(
    unsigned char* tile, const SoftmaxState<kHeadDim, PrefillConfig<kHeadDim>::kMmaRows>& state,
    const PagedAttentionArgs& args, const AttentionItem& item, int kv_head) {
  using Config = PrefillConfig<kHeadDim>;
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kWarpRows = Config::kMmaRows * 16;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int first = static_cast<int>(threadIdx.x / 32) * kWarpRows;
  unsigned char* rows = tile + first * kRowBytes<kHeadDim>;
  __syncwarp();  // no lane reads queries any more
#pragma unroll
  for (int m = 0; m < Config::kMmaRows; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float inverse = 1.0F / state.weight[m][h];
      unsigned char* to = rows + (m * 16 + h * 8 + lane / 4) * kRowBytes<kHeadDim> + lane % 4 * 4;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        *reinterpret_cast<std::uint32_t*>(to + d * 16) =
            pack_pair<T>(state.sums[m][d][2 * h] * inverse, state.sums[m][d][2 * h + 1] * inverse);
      }
    }
  }
  __syncwarp();
  for (int index = lane; index < kWarpRows * kChunks; index += 32) {
    const int row = index / kChunks, chunk = index % kChunks;
    if (first + row >= item.num_packed) break;
    T* to = static_cast<T*>(args.out) + packed_element(args, item, kv_head,
                                                       item.first_packed + first + row,
                                                       args.num_heads, kHeadDim);
    *reinterpret_cast<uint4*>(to + chunk * 8) =
        *reinterpret_cast<const uint4*>(rows + row * kRowBytes<kHeadDim> + chunk * 16);
  }
}

// A persistent grid takes (item, KV head) pairs by stride, long ones first. One barrier a tile:
// it publishes the tile that has arrived and frees the one before, whose place the next one takes.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(PrefillConfig<kHeadDim>::kThreads,
                                  PrefillConfig<kHeadDim>::kCtasPerSm)
    paged_attention_prefill(const PagedAttentionArgs args) {
  using Config = PrefillConfig<kHeadDim>;
  constexpr int kTileGroups = Config::kTileKeys / kGroupKeys;
  constexpr int kWarpRows = Config::kMmaRows * 16;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int group = args.num_heads / args.num_kv_heads;
  const float scale_log2 = args.scale * kLog2E;
  const std::uint32_t queries = smem_address(shared);
  const std::uint32_t ring = queries + Config::kQueryBytes;
  const int first_item = __ldg(args.plan);
  const int num_units = __ldg(args.plan + 1) * args.num_kv_heads;
  griddep_launch();

  for (int unit = static_cast<int>(blockIdx.x); unit < num_units;
       unit += static_cast<int>(gridDim.x)) {
    const AttentionItem item = load_item(args.plan, first_item + unit / args.num_kv_heads);
    const int kv_head = unit % args.num_kv_heads;
    GroupRows rows(args, item, kv_head);
    griddep_wait();  // no kernel writes the plan; after the first item this returns at once
    const int num_tiles =
        (item.key_end - item.key_begin + Config::kTileKeys - 1) / Config::kTileKeys;
    const auto fetch = [&](int tile) {
      const std::uint32_t stage = ring + tile % Config::kStages * 2 * Config::kTileBytes;
#pragma unroll
      for (int g = warp; g < kTileGroups; g += Config::kWarps) {
        const int row = rows(tile * kTileGroups + g);
        const int num_valid =
            item.key_end - (item.key_begin + (tile * kTileGroups + g) * kGroupKeys);
        const std::uint32_t to = stage + g * kGroupKeys * kRowBytes<kHeadDim>;
        copy_group<T, kHeadDim>(to, args.keys, row, num_valid);
        copy_group<T, kHeadDim>(to + Config::kTileBytes, args.values, row, num_valid);
      }
      cp_async_commit();
    };
    copy_queries<T, kHeadDim>(queries, args, item, kv_head);
    fetch(0);

    const auto limit_of = [&](int row) {
      return item.first_limit + (item.first_packed + min(row, item.num_packed - 1)) / group;
    };
    int limits[Config::kMmaRows][2];
#pragma unroll
    for (int m = 0; m < Config::kMmaRows; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        limits[m][h] = limit_of(warp * kWarpRows + m * 16 + h * 8 + lane / 4);
      }
    }
    const int least_limit = limit_of(warp * kWarpRows);
    const int most_limit = limit_of(warp * kWarpRows + kWarpRows - 1);
    const bool is_idle = warp * kWarpRows >= item.num_packed;

    SoftmaxState<kHeadDim, Config::kMmaRows> state;
    state.reset();
    // Operand of rows 0-15: matrices of rows 0-7, rows 8-15, then columns 8-15 likewise.
    const std::uint32_t query_address =
        queries + (warp * kWarpRows + lane % 16) * kRowBytes<kHeadDim> + lane / 16 * 16;
    for (int tile = 0; tile < num_tiles; ++tile) {
      cp_async_wait<0>();
      __syncthreads();
      if (tile + 1 < num_tiles) fetch(tile + 1);
      const int key0 = item.key_begin + tile * Config::kTileKeys;
      if (is_idle || key0 >= most_limit) continue;
      const std::uint32_t stage = ring + tile % Config::kStages * 2 * Config::kTileBytes;
      attend_tile<T, kHeadDim, Config::kTileKeys, Config::kMmaRows>(
          state,
          [&](int k, std::uint32_t (&q)[Config::kMmaRows][4]) {
#pragma unroll
            for (int m = 0; m < Config::kMmaRows; ++m) {
              ldmatrix_x4(q[m], query_address + m * 16 * kRowBytes<kHeadDim> + k * 32);
            }
          },
          stage, stage + Config::kTileBytes, key0, key0 + Config::kTileKeys > least_limit, limits,
          scale_log2);
    }
    state.sum_weights();
    if (!is_idle) store_results<T, kHeadDim>(shared, state, args, item, kv_head);
    __syncthreads();  // the next item overwrites queries and tiles
  }
  griddep_wait();  // a CTA without items must not end before what came before
}

}  // namespace deltazip::cuda
