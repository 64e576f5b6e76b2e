#pragma once

#include <cstddef>

namespace deltazip::cuda {

// Rows in shared memory are padded by one 16-byte chunk: the eight rows of an ldmatrix then fall
// into different banks for every head_dim, 96 included, which no xor swizzle of whole rows allows.
template <int kHeadDim>
inline constexpr int kRowBytes = kHeadDim * 2 + 16;

inline constexpr int kGroupKeys = 8;     // keys that lie together: block_size is a multiple
inline constexpr int kWindowKeys = 256;  // one group per lane

// Decode: 16 packed rows, each warp streams its own 16-key tiles. Three CTAs of about 70 KB an SM,
// all of it under way while warps wait; full bandwidth asks for 32 KB, few CTAs for all they have.
template <int kHeadDim>
struct DecodeConfig {
  static constexpr int kWarps = kHeadDim > 128 ? 2 : 4;
  static constexpr int kStages = kHeadDim > 64 ? 2 : 3;
  static constexpr int kTileKeys = 16;
  static constexpr int kCtasPerSm = 3;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTileBytes = kTileKeys * kRowBytes<kHeadDim>;
  static constexpr int kWarpBytes = kStages * 2 * kTileBytes;
  // Sums of the warps, eight floats of padding against bank conflicts; reuses the tiles.
  static constexpr int kSumFloats = kHeadDim + 8;
  static constexpr std::size_t kSharedBytes = std::size_t{kWarps} * kWarpBytes;
  static_assert(kWarps * 16 * (kSumFloats + 2) * 4 <= kWarps * kWarpBytes);
};

// Prefill: a warp holds 32 rows (16 at head_dim 256) in registers, which halves the shared memory
// traffic per mma; two stages of keys and values; two CTAs an SM hide each other's softmax.
template <int kHeadDim>
struct PrefillConfig {
  static constexpr int kWarps = 4;
  static constexpr int kStages = 2;
  static constexpr int kMmaRows = kHeadDim > 128 ? 1 : 2;  // of 16 rows, per warp
  static constexpr int kRows = kWarps * kMmaRows * 16;
  static constexpr int kTileKeys = kHeadDim > 128 ? 32 : 64;
  static constexpr int kCtasPerSm = 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kQueryBytes = kRows * kRowBytes<kHeadDim>;
  static constexpr int kTileBytes = kTileKeys * kRowBytes<kHeadDim>;
  static constexpr std::size_t kSharedBytes = kQueryBytes + std::size_t{kStages} * 2 * kTileBytes;
};

}  // namespace deltazip::cuda
