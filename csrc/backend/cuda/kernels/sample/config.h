#pragma once

#include <cstdint>

namespace deltazip::cuda::sampling {

// A row is a cluster's. Eight CTAs are the most that every Hopper device takes; 512 threads read
// 32,000 logits in two accesses each.
constexpr int kClusterSize = 8;
constexpr int kThreads = 512;
// Devices before Hopper know no clusters: there a row is one CTA's, and lies in global memory.
constexpr int kRowCtasWithoutClusters = 1;
constexpr std::int64_t kMaxVocabInScratch = 1 << 18;  // twice what any model has
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kRowCtas = kRowCtasWithoutClusters;
#else
constexpr int kRowCtas = kClusterSize;
#endif
// 40 registers a thread: 48 rows are resident at once, where clusters leave some places empty.
constexpr int kCtasPerSm = 3;
constexpr int kWarps = kThreads / 32;

// A search cuts its range in eight: a power of two more costs more sums than it saves barriers.
constexpr int kWays = 8;

// Tokens whose occurrences are counted at once: 32 KB, a CTA's share of a vocabulary of 65,536.
// Larger shares are counted in turns.
constexpr std::int64_t kMaxCounts = 8192;

// A CTA's share of a vocabulary, whole 16-byte accesses of any type.
constexpr std::int64_t share_of(std::int64_t vocab_size, std::int64_t ctas) {
  return (vocab_size + 8 * ctas - 1) / (8 * ctas) * 8;
}

// Probabilities are summed in units of 2^-40 of the likeliest token's: integers, whose sum does not
// depend on the order, and 2^18 tokens of it fit 64 bits. Less than half a unit is never drawn.
constexpr int kMassBits = 40;

}  // namespace deltazip::cuda::sampling
