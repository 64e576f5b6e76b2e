#pragma once

#include <cstdint>
#include <vector>

#include "backend/cpu/kernels/kernels.h"

namespace deltazip::cpu {

// One worker's memory for sampling.
struct SamplerScratch {
  std::vector<float> logits, weights;
  std::vector<std::int32_t> candidates;
  std::vector<std::uint32_t> counts;
  std::vector<double> bucket_mass;
};

// Uniform in [0, 1), a function of (seed, position) alone: Philox4x32-10
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
double uniform_draw(std::uint64_t seed, std::uint64_t position);

// The next token of one row. Order: repetition, presence and frequency penalties on the raw logits,
// biases, bans; then temperature, min-p, top-k, top-p. Ties go to the lowest token id.
SampledToken sample_row(const Kernels& kernels, const float* logits, std::int64_t vocab_size,
                        const SamplingRow& row, SamplerScratch& scratch);

}  // namespace deltazip::cpu
