#include "tensors.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "deltazip/base/error.h"

namespace deltazip {

std::string layer_tensor(std::int32_t layer, std::string_view suffix) {
  return "model.layers." + std::to_string(layer) + "." + std::string(suffix);
}

std::vector<ExpectedTensor> expected_tensors(const ModelConfig& config) {
  const std::int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const std::int64_t q_size = std::int64_t{config.num_heads} * config.head_dim;
  const std::int64_t kv_size = std::int64_t{config.num_kv_heads} * config.head_dim;

  std::vector<ExpectedTensor> out;
  out.push_back({std::string(kEmbedding), {config.vocab_size, hidden}, true});
  out.push_back({std::string(kFinalNorm), {hidden}});
  out.push_back(
      {std::string(kLmHead), {config.vocab_size, hidden}, true, config.tie_word_embeddings});
  for (std::int32_t i = 0; i < config.num_layers; ++i) {
    const auto add = [&](std::string_view part, std::int64_t rows, std::int64_t columns,
                         bool has_bias) {
      const std::string name = layer_tensor(i, part);
      out.push_back({name + ".weight", {rows, columns}, true});
      if (has_bias) out.push_back({name + ".bias", {rows}});
    };
    out.push_back({layer_tensor(i, "input_layernorm.weight"), {hidden}});
    out.push_back({layer_tensor(i, "post_attention_layernorm.weight"), {hidden}});
    add("self_attn.q_proj", q_size, hidden, config.attention_bias);
    add("self_attn.k_proj", kv_size, hidden, config.attention_bias);
    add("self_attn.v_proj", kv_size, hidden, config.attention_bias);
    add("self_attn.o_proj", hidden, q_size, config.attention_bias);
    add("mlp.gate_proj", inner, hidden, config.mlp_bias);
    add("mlp.up_proj", inner, hidden, config.mlp_bias);
    add("mlp.down_proj", hidden, inner, config.mlp_bias);
  }
  return out;
}

bool is_ignored(std::string_view tensor_name) {
  return tensor_name.ends_with("rotary_emb.inv_freq");
}

void check_tensors(const Checkpoint& checkpoint, const ModelConfig& config) {
  std::map<std::string_view, const ExpectedTensor*> by_name;
  const std::vector<ExpectedTensor> expected = expected_tensors(config);
  for (const ExpectedTensor& want : expected) {
    by_name.emplace(want.name, &want);
    const SafetensorsEntry* found = checkpoint.find(want.name);
    if (found == nullptr && want.is_optional) continue;
    DZ_CHECK(found != nullptr, checkpoint.folder().string(), ": tensor '", want.name, "' ",
             want.shape.str(), " is missing; config.json asks for it");
    DZ_CHECK(found->view.shape == want.shape, checkpoint.folder().string(), ": tensor '", want.name,
             "' is ", found->view.shape.str(), " in the checkpoint, config.json makes ", "it ",
             want.shape.str());
    DZ_CHECK(is_floating(found->view.dtype), checkpoint.folder().string(), ": tensor '", want.name,
             "' must be float32, float16 or bfloat16, it is ", name(found->view.dtype));
  }
  for (const SafetensorsEntry& entry : checkpoint.tensors()) {
    DZ_CHECK(by_name.contains(entry.name) || is_ignored(entry.name), checkpoint.folder().string(),
             ": tensor '", entry.name, "' ", entry.view.shape.str(), " is not part of a ",
             config.architecture, " with ", config.num_layers, " layers, attention_bias ",
             config.attention_bias ? "true" : "false", ", mlp_bias ",
             config.mlp_bias ? "true" : "false");
  }
}

bool lm_head_is_embedding(const Checkpoint& checkpoint, const ModelConfig& config) {
  if (!config.tie_word_embeddings) return false;
  const SafetensorsEntry* head = checkpoint.find(kLmHead);
  if (head == nullptr) return true;
  const SafetensorsEntry* table = checkpoint.find(kEmbedding);
  DZ_CHECK(
      head->view.dtype == table->view.dtype && std::ranges::equal(head->bytes(), table->bytes()),
      checkpoint.folder().string(), ": config.json has 'tie_word_embeddings' true, but '", kLmHead,
      "' is stored and differs from '", kEmbedding, "'; set it to false, or drop one of the two");
  return true;
}

}  // namespace deltazip
