#pragma once

#include <cstdint>

namespace deltazip::cuda::base_gemm {

// A tensor map with 128-byte swizzle has boxes of 128 bytes a row: 64 elements along k.
inline constexpr int kBoxColumns = 64;
inline constexpr int kBoxRowBytes = 128;

// Weights of one stage. From 12 KB a stage on, one producer reaches the read stream's full rate.
inline constexpr int kStageWeightBytes = 16 * 1024;

// A product's CTA fits an SM (228 KB, 64 K registers) beside one of the next product, whose weights
// are then on their way while this one ends, but never beside another of its own: SMs become free
// unevenly (attention), and two on one SM would take twice as long as all others. So products take
// two forms in turns: one asks for more than half of the shared memory, the other, by warps that
// do nothing, for more than half of the registers. 48 KB in flight per SM saturate HBM3.
enum class Form : std::uint8_t { kDeep, kWide };
constexpr int ring_bytes(Form form) { return (form == Form::kDeep ? 115 : 102) * 1024; }
// Of a multiprocessor; a CTA takes 1 KB beside what it asks for, and 1 KB aligns its ring.
inline constexpr int kSmSharedBytes = 228 * 1024;
constexpr int shared_bytes(Form form) { return ring_bytes(form) + 2 * 1024; }
static_assert(2 * shared_bytes(Form::kDeep) > kSmSharedBytes);
static_assert(shared_bytes(Form::kDeep) + shared_bytes(Form::kWide) <= kSmSharedBytes - 4 * 1024);
// At 64 registers a thread up to 16 rows, 88 up to 32, 112 beyond: more than half of 65536.
constexpr int wide_threads(int tokens) { return tokens <= 16 ? 544 : tokens <= 32 ? 384 : 320; }

// A share smaller than this costs more to add up than it saves to read.
inline constexpr int kMinUnitsPerCta = 4;

// Rows of x of the widest instance.
inline constexpr int kMaxTokens = 64;

// Out rows of one block. With 32, x is fetched twice as often and a product is 1 to 3 % slower.
inline constexpr int kBlockRows = 64;
inline constexpr int kUnitColumns = kStageWeightBytes / (kBlockRows * 2);

// Out rows of a warp, and of its counter.
inline constexpr int kWarpRows = 16;

// Units of work: one stage of one block each, k fastest.
struct Schedule {
  std::uint32_t units_per_block = 0;
  std::uint32_t num_units = 0;
  std::uint32_t num_ctas = 0;

  // Equal contiguous shares; owner() is the inverse of first_unit().
  constexpr std::uint32_t first_unit(std::uint32_t cta) const {
    return static_cast<std::uint32_t>(std::uint64_t{cta} * num_units / num_ctas);
  }
  constexpr std::uint32_t owner(std::uint32_t unit) const {
    return static_cast<std::uint32_t>((std::uint64_t{unit + 1} * num_ctas - 1) / num_units);
  }
};

constexpr Schedule make_schedule(std::int64_t out_features, std::int64_t in_features, int num_sms) {
  const std::int64_t blocks = (out_features + kBlockRows - 1) / kBlockRows;
  const std::int64_t units_per_block = (in_features + kUnitColumns - 1) / kUnitColumns;
  const std::int64_t num_units = blocks * units_per_block;
  const std::int64_t wanted = (num_units + kMinUnitsPerCta - 1) / kMinUnitsPerCta;
  return {static_cast<std::uint32_t>(units_per_block), static_cast<std::uint32_t>(num_units),
          static_cast<std::uint32_t>(wanted < num_sms ? wanted : num_sms)};
}

}  // namespace deltazip::cuda::base_gemm
