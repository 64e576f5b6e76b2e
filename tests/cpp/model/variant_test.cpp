#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "deltazip/base/error.h"
#include "deltazip/model/model.h"
#include "io/safetensors_builder.h"
#include "model/harness.h"
#include "model/tensors.h"
#include "model/tiny_delta.h"
#include "model/tiny_model.h"

namespace deltazip {
namespace {

using namespace test;
using Tokens = std::vector<std::int32_t>;

struct Served {
  TinyModel model;
  TemporaryFolder folder;
  std::unique_ptr<Harness> harness;

  explicit Served(const std::string& patch) : model(make_tiny_model(patch, 1)) {
    model.write(folder.path());
    harness = std::make_unique<Harness>(folder.path(), Harness::Options{});
  }
  DeviceDelta load(const TinyDelta& delta) {
    return delta.on(harness->backend(), harness->backend(), model);
  }
};

class Variants : public ::testing::TestWithParam<const char*> {};

TEST_P(Variants, ADeltaServedIsTheMergedCheckpoint) {
  Served served(GetParam());
  const TinyDelta delta = change_everything(served.model, 3);
  const DeviceDelta loaded = served.load(delta);
  const auto variant = served.harness->model().bind(loaded);
  const Tokens tokens = random_tokens(30, 4);
  const std::vector<float> got = served.harness->run(tokens, 64, variant.get());
  EXPECT_LT(relative_error(got, reference_logits(delta.merged(served.model), tokens)), 1e-5);
  // And it is another model than the base.
  EXPECT_GT(relative_error(got, reference_logits(served.model, tokens)), 0.05);
  // Which the base has not become.
  EXPECT_LT(relative_error(served.harness->run(tokens, 64), reference_logits(served.model, tokens)),
            1e-5);
}

INSTANTIATE_TEST_SUITE_P(
    Tiny, Variants,
    ::testing::Values("{}", R"({"tie_word_embeddings": true, "dtype": "bfloat16"})",
                      R"({"attention_bias": true, "mlp_bias": true, "head_dim": 16})",
                      R"({"num_key_value_heads": 1, "hidden_size": 44, "num_attention_heads": 2,
                          "intermediate_size": 70})"));

// One tensor at a time: what is not in the delta is the base's.
TEST(Variant, EveryTensorOfADeltaCounts) {
  Served served(R"({"attention_bias": true, "mlp_bias": true})");
  const TinyDelta all = change_everything(served.model, 3);
  const Tokens tokens = random_tokens(12, 4);
  const std::vector<double> base = reference_logits(served.model, tokens);
  for (const auto& [name, tensor] : served.model.tensors) {
    TinyDelta one;
    if (all.matrices.contains(name)) {
      one.matrices.emplace(name, all.matrices.at(name));
    } else {
      one.replaced.emplace(name, all.replaced.at(name));
    }
    const DeviceDelta loaded = served.load(one);
    const auto variant = served.harness->model().bind(loaded);
    const std::vector<float> got = served.harness->run(tokens, 64, variant.get());
    EXPECT_LT(relative_error(got, reference_logits(one.merged(served.model), tokens)), 1e-5)
        << name;
    // A key's bias moves all scores of a query alike, except for what RoPE makes of it.
    EXPECT_GT(relative_error(got, base), 1e-4) << name;
  }
}

TEST(Variant, ATiedHeadThatIsStoredFollowsItsOwnEntry) {
  Served served(R"({"tie_word_embeddings": true})");
  TinyModel stored = served.model;
  stored.tensors["lm_head.weight"] = stored.tensors["model.embed_tokens.weight"];
  const TemporaryFolder folder;
  stored.write(folder.path());
  Harness harness(folder.path(), {});
  TinyDelta delta;
  delta.matrices.emplace("model.embed_tokens.weight",
                         make_tiny_delta_matrix(DeltaType::kDenseInt4, 61, 32, 0.02F, 9));
  const Tokens tokens = random_tokens(8, 4);
  const DeviceDelta loaded = delta.on(harness.backend(), harness.backend(), stored);
  const auto variant = harness.model().bind(loaded);
  EXPECT_LT(relative_error(harness.run(tokens, 64, variant.get()),
                           reference_logits(delta.merged(stored), tokens)),
            1e-5);
}

TEST(Variant, AMixedBatchIsBitwiseEachAlone) {
  Served served(R"({"tie_word_embeddings": true, "attention_bias": true})");
  Harness& harness = *served.harness;
  const DeviceDelta first = served.load(change_everything(served.model, 3));
  TinyDelta little = change_everything(served.model, 5);
  for (std::int32_t i = 0; i < 2; ++i) little.matrices.erase(layer_tensor(i, "mlp.up_proj.weight"));
  const DeviceDelta second = served.load(little);
  const std::vector<std::shared_ptr<const VariantWeights>> bound = {harness.model().bind(first),
                                                                    harness.model().bind(second)};
  const std::vector<const VariantWeights*> variants = {nullptr, bound[0].get(), bound[1].get()};

  // Per variant two sequences: their prompts' logits, then one token at a time, all together.
  std::vector<Tokens> tokens;
  std::vector<std::vector<float>> alone, mixed(6);
  for (std::uint32_t i = 0; i < 6; ++i) {
    tokens.push_back(random_tokens(5 + 2 * i, 20 + i));
    alone.push_back(harness.run(tokens[i], 64, variants[i / 2]));
  }
  std::vector<Harness::Chunk> chunks;
  for (std::uint32_t i = 0; i < 6; ++i) {
    const std::int32_t id = harness.add_sequence(variants[i / 2]);
    chunks.push_back({id, Tokens(tokens[i].begin(), tokens[i].end() - 3)});
  }
  for (std::ptrdiff_t left = 3; left >= 0; --left) {
    const auto logits = harness.step(chunks);
    for (std::uint32_t i = 0; i < 6; ++i) {
      mixed[i].insert(mixed[i].end(), logits[i].begin(), logits[i].end());
      if (left > 0) chunks[i].tokens = {*(tokens[i].end() - left)};
    }
  }
  for (std::size_t i = 0; i < 6; ++i) EXPECT_EQ(mixed[i], alone[i]) << "sequence " << i;
}

// In the last layer only rows with logits go on: their deltas, norms and biases are found anew.
TEST(Variant, LogitsOfSomeRowsAreThoseOfAll) {
  Served served(R"({"attention_bias": true, "mlp_bias": true})");
  Harness& harness = *served.harness;
  const DeviceDelta loaded[] = {served.load(change_everything(served.model, 3)),
                                served.load(change_everything(served.model, 5))};
  const auto first = harness.model().bind(loaded[0]), second = harness.model().bind(loaded[1]);
  const VariantWeights* variants[] = {nullptr, first.get(), first.get(), second.get()};
  std::vector<Harness::Chunk> whole, last;
  for (std::uint32_t i = 0; i < 4; ++i) {
    const Tokens tokens = random_tokens(i == 1 ? 1 : 4 + i, 30 + i);
    whole.push_back({harness.add_sequence(variants[i]), tokens});
    last.push_back({harness.add_sequence(variants[i]), tokens});
  }
  const auto all = harness.step(whole), some = harness.step(last, true);
  const auto vocab = static_cast<std::ptrdiff_t>(served.model.config.vocab_size);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(some[i], std::vector<float>(all[i].end() - vocab, all[i].end())) << "sequence " << i;
  }
}

TEST(Variant, BindRefusesPartsOfAnotherKindOrShape) {
  Served served("{}");
  Model& model = served.harness->model();
  const auto refusal = [&](const std::string& name, auto change) {
    DeviceDelta delta = served.load(change_everything(served.model, 3));
    auto host = std::make_shared<HostDelta>();
    host->parts = delta.host->parts;
    for (DeltaPart& part : host->parts) {
      if (part.name == name) change(part);
    }
    const std::shared_ptr<const HostDelta> bytes = delta.host;
    delta.host = host;
    const std::string message = message_of<InvalidArgument>([&] { model.bind(delta); });
    EXPECT_NE(message.find("'" + name + "'"), std::string::npos) << message;
    return message;
  };
  refusal("model.norm.weight", [](DeltaPart& part) { part.kind = DeltaKind::kMatrix; });
  refusal("model.layers.1.mlp.up_proj.weight",
          [](DeltaPart& part) { part.kind = DeltaKind::kReplaced; });
  EXPECT_NE(refusal("model.layers.0.self_attn.k_proj.weight",
                    [](DeltaPart& part) { part.matrix.rows = 32; })
                .find("[32, 32], the base has [16, 32]"),
            std::string::npos);
  EXPECT_NE(refusal("model.norm.weight", [](DeltaPart& part) { part.num_elements = 31; })
                .find("31 values, the base has 32"),
            std::string::npos);
}

}  // namespace
}  // namespace deltazip
