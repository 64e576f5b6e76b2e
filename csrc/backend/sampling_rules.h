#pragma once

// What every backend's sampler must agree on to the bit. Plain arithmetic, good for host and
// device.

#include <cstdint>

#include "deltazip/backend/params.h"

namespace deltazip {

// Below this a division by the temperature has no meaning in float; the limit is greedy.
inline constexpr float kMinTemperature = 1e-5F;

constexpr bool is_greedy(const SamplingRow& row) {
  return row.temperature < kMinTemperature || row.top_k == 1;
}

constexpr bool has_output_penalty(const SamplingRow& row) {
  return row.presence_penalty != 0.0F || row.frequency_penalty != 0.0F;
}

constexpr bool uses_history(const SamplingRow& row) {
  return row.repetition_penalty != 1.0F || has_output_penalty(row);
}

constexpr bool changes_logits(const SamplingRow& row) {
  return uses_history(row) || row.num_biases > 0 || row.num_banned_tokens > 0;
}

// Uniform in [0, 1), a function of (seed, position) alone: Philox4x32-10
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
constexpr double uniform_draw(std::uint64_t seed, std::uint64_t position) {
  auto c0 = static_cast<std::uint32_t>(position), c1 = static_cast<std::uint32_t>(position >> 32);
  std::uint32_t c2 = 0, c3 = 0;
  auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<std::uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const std::uint64_t bits = (std::uint64_t{c0} << 32) | c1;
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace deltazip
