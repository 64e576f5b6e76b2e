#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "deltazip/base/dtype.h"

namespace deltazip {

enum class RopeScaling : std::uint8_t { kNone, kLinear, kDynamic, kLlama3, kYarn };

struct RopeConfig {
  double theta = 10000.0;
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;
  std::int64_t original_max_positions = 0;
  // llama3
  double low_freq_factor = 1.0, high_freq_factor = 4.0;
  // yarn; attention_factor, mscale: 0 is "not given"
  double beta_fast = 32.0, beta_slow = 1.0, attention_factor = 0.0, mscale = 0.0,
         mscale_all_dim = 0.0;
  bool truncate = true;
};

// What config.json says, checked.
struct ModelConfig {
  std::string architecture;
  std::int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  std::int32_t num_layers = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::int64_t max_positions = 0;
  float rms_norm_epsilon = 1e-6F;
  bool tie_word_embeddings = false, attention_bias = false, mlp_bias = false;
  DType dtype = DType::kFloat32;  // of the checkpoint
  RopeConfig rope;
  std::vector<std::int32_t> eos_token_ids;

  // Throws InvalidArgument naming the key, what was expected and what came. Reads both spellings
  // of rope settings: rope_theta + rope_scaling (transformers 4) and rope_parameters (5).
  static ModelConfig parse(std::string_view config_json);
  // generation_config.json's eos_token_id, where it has one, replaces config.json's.
  void apply_generation_config(std::string_view generation_config_json);
  void validate() const;

  // The longest sequence the position encoding is made for: max_positions, or that times the
  // factor where RoPE scales itself with the length (dynamic).
  std::int64_t max_length() const;
};

}  // namespace deltazip
