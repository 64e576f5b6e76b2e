#include "model/tensors.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "deltazip/base/error.h"
#include "deltazip/io/checkpoint.h"
#include "io/safetensors_builder.h"
#include "model/tiny_model.h"

namespace deltazip {
namespace {

using test::make_tiny_model;
using test::message_of;
using test::TemporaryFolder;
using test::TinyModel;

std::string refusal(const TinyModel& model) {
  const TemporaryFolder folder;
  model.write(folder.path());
  return message_of<InvalidArgument>(
      [&] { check_tensors(Checkpoint::open(folder.path()), model.config); });
}

void expect_parts(const std::string& message, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nshould hold: " << part;
  }
}

TEST(Tensors, EveryNameIsExpectedOnceAndAccepted) {
  for (const char* patch : {"{}", R"({"tie_word_embeddings": true})",
                            R"({"attention_bias": true, "mlp_bias": true, "head_dim": 16})"}) {
    const TinyModel model = make_tiny_model(patch, 1);
    std::set<std::string> names;
    for (const ExpectedTensor& each : expected_tensors(model.config)) {
      EXPECT_TRUE(names.insert(each.name).second) << each.name;
    }
    EXPECT_EQ(refusal(model), "") << patch;
  }
}

TEST(Tensors, OldRotaryBuffersAreIgnored) {
  TinyModel model = make_tiny_model("{}", 1);
  model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = {{2}, {1.0F, 0.5F}};
  EXPECT_EQ(refusal(model), "");
}

TEST(Tensors, AMissingExtraOrMisshapenOneIsNamed) {
  TinyModel model = make_tiny_model("{}", 1);
  model.tensors.erase("model.layers.1.mlp.up_proj.weight");
  expect_parts(refusal(model), {"model.layers.1.mlp.up_proj.weight", "[48, 32]", "missing"});

  model = make_tiny_model("{}", 1);
  model.tensors["model.layers.2.mlp.up_proj.weight"] = {{2}, {1.0F, 1.0F}};
  expect_parts(refusal(model), {"model.layers.2.mlp.up_proj.weight", "[2]", "2 layers"});

  model = make_tiny_model("{}", 1);
  model.tensors["model.layers.0.self_attn.q_proj.bias"] = {{2}, {1.0F, 1.0F}};
  expect_parts(refusal(model), {"q_proj.bias", "attention_bias false"});

  model = make_tiny_model("{}", 1);
  model.tensors["model.norm.weight"] = {{2}, {1.0F, 1.0F}};
  expect_parts(refusal(model), {"model.norm.weight", "[2]", "[32]"});

  model = make_tiny_model(R"({"tie_word_embeddings": true})", 1);
  model.config.tie_word_embeddings = false;
  expect_parts(refusal(model), {"lm_head.weight", "missing"});
}

TEST(Tensors, ATiedHeadMayBeStoredOnlyIfItIsEqual) {
  TinyModel model = make_tiny_model(R"({"tie_word_embeddings": true})", 1);
  const auto is_one = [&] {
    const TemporaryFolder folder;
    model.write(folder.path());
    return lm_head_is_embedding(Checkpoint::open(folder.path()), model.config);
  };
  EXPECT_TRUE(is_one());
  model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"];
  EXPECT_TRUE(is_one());
  model.tensors["lm_head.weight"].values[5] += 1.0F;
  expect_parts(message_of<InvalidArgument>(is_one),
               {"tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight"});
  model.config.tie_word_embeddings = false;
  EXPECT_FALSE(is_one());
}

}  // namespace
}  // namespace deltazip
