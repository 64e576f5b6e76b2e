#pragma once

#include <cstdint>

namespace deltazip::cuda::sampling {

// A row is a cluster's. Eight CTAs are the most that every Hopper device takes; 512 threads read
// 32,000 logits in two accesses each.
constexpr int kClusterSize = 8;
constexpr int kThreads = 512;
// 40 registers a thread: 48 rows are resident at once, where clusters leave some places empty.
constexpr int kCtasPerSm = 3;
constexpr int kWarps = kThreads / 32;

// A search cuts its range in eight: a power of two more costs more sums than it saves barriers.
constexpr int kWays = 8;

// Tokens whose occurrences are counted at once: 32 KB, a CTA's share of a vocabulary of 65,536.
// Larger shares are counted in turns.
constexpr std::int64_t kMaxCounts = 8192;

// Probabilities are summed in units of 2^-40 of the likeliest token's: integers, whose sum does not
// depend on the order, and 2^18 tokens of it fit 64 bits. Less than half a unit is never drawn.
constexpr int kMassBits = 40;

}  // namespace deltazip::cuda::sampling
