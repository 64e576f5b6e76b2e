#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "deltazip/model/config.h"

namespace deltazip {

// Rotary position encoding as transformers computes it: in float32, step by step, since at long
// positions the rounding of a frequency times the position is what the model was trained with.
// Sources: Su et al., RoFormer (2021); Peng et al., YaRN (2023); Llama 3.1's frequency scaling.
class Rope {
 public:
  explicit Rope(const ModelConfig& config);

  // Writes head_dim / 2 cosines, then as many sines, for one position. `length` is the sequence
  // length that the dynamic scaling adapts to; the others ignore it.
  void write_angles(std::int64_t position, std::int64_t length, std::span<float> out) const;

  // True if a sequence of this length has frequencies of its own.
  bool depends_on_length(std::int64_t length) const;

  std::span<const float> frequencies() const { return frequencies_; }  // [head_dim / 2]
  float attention_factor() const { return attention_factor_; }         // scales cos and sin

 private:
  std::vector<float> frequencies_at(std::int64_t length) const;

  RopeConfig rope_;
  std::int32_t head_dim_;
  std::int64_t max_positions_;
  std::vector<float> frequencies_;
  float attention_factor_ = 1.0F;
  // The last length asked for: the rows of one prompt share it.
  mutable std::int64_t cached_length_ = 0;
  mutable std::vector<float> cached_frequencies_;
};

}  // namespace deltazip
