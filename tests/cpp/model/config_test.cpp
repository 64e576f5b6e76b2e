#include "deltazip/model/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "deltazip/base/error.h"
#include "io/safetensors_builder.h"

namespace deltazip {
namespace {

using Json = nlohmann::json;
using test::message_of;

Json good() {
  return Json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16", "eos_token_id": 2
  })");
}

ModelConfig parse(const Json& json) { return ModelConfig::parse(json.dump()); }

TEST(ModelConfig, ReadsAPlainLlama) {
  const ModelConfig config = parse(good());
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.vocab_size, 128);
  EXPECT_EQ(config.hidden_size, 64);
  EXPECT_EQ(config.intermediate_size, 96);
  EXPECT_EQ(config.num_layers, 2);
  EXPECT_EQ(config.num_heads, 4);
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.max_positions, 256);
  EXPECT_FLOAT_EQ(config.rms_norm_epsilon, 1e-5F);
  EXPECT_EQ(config.dtype, DType::kBFloat16);
  EXPECT_EQ(config.eos_token_ids, std::vector<std::int32_t>{2});
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_EQ(config.rope.scaling, RopeScaling::kNone);
  EXPECT_EQ(config.rope.theta, 10000.0);
  EXPECT_EQ(config.max_length(), 256);
}

TEST(ModelConfig, FillsInWhatTransformersFillsIn) {
  Json json = good();
  for (const char* key : {"num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
                          "hidden_act", "torch_dtype", "eos_token_id"}) {
    json.erase(key);
  }
  json["head_dim"] = nullptr;
  const ModelConfig config = parse(json);
  EXPECT_EQ(config.num_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.max_positions, 2048);
  EXPECT_FLOAT_EQ(config.rms_norm_epsilon, 1e-6F);
  EXPECT_EQ(config.dtype, DType::kFloat32);
  EXPECT_TRUE(config.eos_token_ids.empty());
}

TEST(ModelConfig, ReadsBothSpellingsOfDtypeEosAndHeadDim) {
  Json json = good();
  json.erase("torch_dtype");
  json["dtype"] = "float16";
  json["eos_token_id"] = {2, 5};
  json["head_dim"] = 32;
  const ModelConfig config = parse(json);
  EXPECT_EQ(config.dtype, DType::kFloat16);
  EXPECT_EQ(config.eos_token_ids, (std::vector<std::int32_t>{2, 5}));
  EXPECT_EQ(config.head_dim, 32);
}

TEST(ModelConfig, ReadsRopeOfTransformers4And5Alike) {
  Json four = good(), five = good();
  four["rope_theta"] = 500000.0;
  four["rope_scaling"] = {{"type", "llama3"},
                          {"factor", 8.0},
                          {"low_freq_factor", 1.0},
                          {"high_freq_factor", 4.0},
                          {"original_max_position_embeddings", 64}};
  five["rope_parameters"] = {{"rope_type", "llama3"},  {"factor", 8},
                             {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0},
                             {"rope_theta", 500000.0}, {"original_max_position_embeddings", 64}};
  for (const Json& json : {four, five}) {
    const RopeConfig rope = parse(json).rope;
    EXPECT_EQ(rope.scaling, RopeScaling::kLlama3);
    EXPECT_EQ(rope.theta, 500000.0);
    EXPECT_EQ(rope.factor, 8.0);
    EXPECT_EQ(rope.low_freq_factor, 1.0);
    EXPECT_EQ(rope.high_freq_factor, 4.0);
    EXPECT_EQ(rope.original_max_positions, 64);
  }
}

TEST(ModelConfig, YarnTakesItsFactorFromTheLengthsWhenNotGiven) {
  Json json = good();
  json["rope_parameters"] = {{"rope_type", "yarn"}, {"original_max_position_embeddings", 64},
                             {"beta_fast", 0},      {"truncate", false},
                             {"factor", nullptr},   {"mscale", 1.0}};
  const RopeConfig rope = parse(json).rope;
  EXPECT_EQ(rope.scaling, RopeScaling::kYarn);
  EXPECT_EQ(rope.factor, 4.0);
  EXPECT_EQ(rope.beta_fast, 32.0);
  EXPECT_EQ(rope.mscale, 1.0);
  EXPECT_FALSE(rope.truncate);
}

TEST(ModelConfig, DynamicRopeReachesFurtherThanItsTable) {
  Json json = good();
  json["rope_scaling"] = {{"rope_type", "dynamic"}, {"factor", 2.5}};
  EXPECT_EQ(parse(json).max_length(), 640);
}

TEST(ModelConfig, ReadsMistralWithoutAWindow) {
  Json json = good();
  json["architectures"] = {"MistralForCausalLM"};
  json["sliding_window"] = nullptr;
  json["attention_bias"] = true;  // not a setting of this architecture
  const ModelConfig config = parse(json);
  EXPECT_EQ(config.architecture, "MistralForCausalLM");
  EXPECT_FALSE(config.attention_bias);

  json["sliding_window"] = 256;  // as long as the model: never closes
  EXPECT_NO_THROW(parse(json));
  json.erase("sliding_window");  // 4096, also longer
  EXPECT_NO_THROW(parse(json));
  json["max_position_embeddings"] = 8192;
  EXPECT_NE(message_of<InvalidArgument>([&] { parse(json); }).find("4096"), std::string::npos);
}

TEST(ModelConfig, GenerationConfigReplacesTheEndTokens) {
  ModelConfig config = parse(good());
  config.apply_generation_config(R"({"temperature": 0.6})");
  EXPECT_EQ(config.eos_token_ids, std::vector<std::int32_t>{2});
  config.apply_generation_config(R"({"eos_token_id": [7, 9]})");
  EXPECT_EQ(config.eos_token_ids, (std::vector<std::int32_t>{7, 9}));
  EXPECT_THROW(config.apply_generation_config(R"({"eos_token_id": 128})"), InvalidArgument);
  EXPECT_THROW(config.apply_generation_config("[]"), InvalidArgument);
}

TEST(ModelConfig, RefusesWhatItCannotServeAndSaysWhy) {
  struct Case {
    const char* patch;  // merged into the good config
    std::vector<const char*> message;
  };
  const std::vector<Case> cases = {
      {R"({"architectures": ["GPT2LMHeadModel"]})", {"GPT2LMHeadModel", "LlamaForCausalLM"}},
      {R"({"architectures": null})", {"architectures", "nothing"}},
      {R"({"architectures": []})", {"architectures", "[]"}},
      {R"({"vocab_size": null})", {"vocab_size", "missing"}},
      {R"({"vocab_size": 0})", {"vocab_size", "got 0"}},
      {R"({"vocab_size": -5})", {"vocab_size", "got -5"}},
      {R"({"vocab_size": 1e30})", {"vocab_size", "1e+30"}},
      {R"({"vocab_size": 18446744073709551615})", {"vocab_size", "18446744073709551615"}},
      {R"({"vocab_size": "many"})", {"vocab_size", "\"many\""}},
      {R"({"vocab_size": 12.5})", {"vocab_size", "12.5"}},
      {R"({"hidden_size": 66})", {"hidden_size", "66", "num_attention_heads", "4"}},
      {R"({"hidden_size": 4611686018427387904})", {"hidden_size"}},
      {R"({"num_hidden_layers": 1000000})", {"num_hidden_layers", "1000000"}},
      {R"({"num_key_value_heads": 3})", {"num_attention_heads", "num_key_value_heads", "3"}},
      {R"({"head_dim": 15})", {"head_dim", "even", "15"}},
      {R"({"max_position_embeddings": true})", {"max_position_embeddings", "true"}},
      {R"({"rms_norm_eps": 0})", {"rms_norm_eps"}},
      {R"({"rms_norm_eps": "small"})", {"rms_norm_eps", "small"}},
      {R"({"hidden_act": "gelu"})", {"hidden_act", "silu", "gelu"}},
      {R"({"torch_dtype": "float8"})", {"dtype", "float8"}},
      {R"({"torch_dtype": "int32"})", {"dtype", "int32"}},
      {R"({"tie_word_embeddings": 1})", {"tie_word_embeddings", "true or false"}},
      {R"({"quantization_config": {"bits": 4}})", {"quantization_config", "bits"}},
      {R"({"layer_types": ["full_attention", "sliding_attention"]})", {"layer_types"}},
      {R"({"eos_token_id": 128})", {"eos_token_id", "127", "128"}},
      {R"({"eos_token_id": [2, -1]})", {"eos_token_id", "-1"}},
      {R"({"partial_rotary_factor": 0.5})", {"partial_rotary_factor"}},
      {R"({"rope_parameters": {"partial_rotary_factor": 0.5}})", {"partial_rotary_factor"}},
      {R"({"rope_theta": 0})", {"rope_theta"}},
      {R"({"rope_parameters": 7})", {"rope_parameters", "object"}},
      {R"({"rope_parameters": {"rope_type": "longrope"}})", {"longrope", "yarn"}},
      {R"({"rope_scaling": {"type": "linear"}})", {"rope_scaling", "factor", "missing"}},
      {R"({"rope_scaling": {"type": "linear", "factor": 0}})", {"factor"}},
      {R"({"rope_scaling": {"type": "llama3", "factor": 8}})", {"low_freq_factor"}},
      {R"({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4,
                            "high_freq_factor": 4}})",
       {"high_freq_factor", "low_freq_factor"}},
      {R"({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 32}})",
       {"beta_fast", "beta_slow"}},
  };
  for (const Case& each : cases) {
    Json json = good();
    json.update(Json::parse(each.patch));
    const std::string message = message_of<InvalidArgument>([&] { parse(json); });
    EXPECT_TRUE(message.starts_with("config.json")) << each.patch << " gave: " << message;
    for (const char* part : each.message) {
      EXPECT_NE(message.find(part), std::string::npos)
          << each.patch << " gave: " << message << ", expected to read " << part;
    }
  }
}

TEST(ModelConfig, RefusesTextThatIsNoObject) {
  for (const char* text : {"", "[]", "7", "{", "{\"a\": 1,}", "\xff\xfe"}) {
    EXPECT_THROW(ModelConfig::parse(text), InvalidArgument) << text;
  }
  EXPECT_THROW(ModelConfig::parse(std::string(100000, '[')), InvalidArgument);
}

}  // namespace
}  // namespace deltazip
