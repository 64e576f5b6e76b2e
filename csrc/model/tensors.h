#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "deltazip/base/tensor_view.h"
#include "deltazip/io/checkpoint.h"
#include "deltazip/model/config.h"

namespace deltazip {

// One tensor that a checkpoint of this model has, under Hugging Face's name.
struct ExpectedTensor {
  std::string name;
  Shape shape;
  bool is_matrix = false;    // a delta may compress it; vectors (norms, biases) are replaced
  bool is_optional = false;  // a tied lm_head that is stored all the same
};

// "model.layers.3." + suffix
std::string layer_tensor(std::int32_t layer, std::string_view suffix);

inline constexpr std::string_view kEmbedding = "model.embed_tokens.weight";
inline constexpr std::string_view kFinalNorm = "model.norm.weight";
inline constexpr std::string_view kLmHead = "lm_head.weight";

// Every tensor of the model, in no particular order.
std::vector<ExpectedTensor> expected_tensors(const ModelConfig& config);

// Buffers that old checkpoints hold and that config.json determines anyway.
bool is_ignored(std::string_view tensor_name);

// Throws InvalidArgument: a tensor missing, unknown, of another shape or not floating.
void check_tensors(const Checkpoint& checkpoint, const ModelConfig& config);

// True if lm_head and the embedding are one table: tied and not stored, or stored equal. Throws
// InvalidArgument if config.json ties them and the checkpoint holds two that differ.
bool lm_head_is_embedding(const Checkpoint& checkpoint, const ModelConfig& config);

}  // namespace deltazip
