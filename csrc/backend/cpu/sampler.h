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

// The next token of one row. Order: repetition, presence and frequency penalties on the raw logits,
// biases, bans; then temperature, min-p, top-k, top-p. Ties go to the lowest token id.
SampledToken sample_row(const Kernels& kernels, const float* logits, std::int64_t vocab_size,
                        const SamplingRow& row, SamplerScratch& scratch);

}  // namespace deltazip::cpu
