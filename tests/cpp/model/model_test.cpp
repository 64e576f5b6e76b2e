#include "deltazip/model/model.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "backend/wrapped_backend.h"
#include "deltazip/base/error.h"
#include "io/safetensors_builder.h"
#include "model/harness.h"
#include "model/tiny_model.h"

namespace deltazip {
namespace {

using test::draw;
using test::Harness;
using test::make_tiny_model;
using test::message_of;
using test::random_tokens;
using test::relative_error;
using test::TemporaryFolder;
using test::TinyModel;
using Tokens = std::vector<std::int32_t>;

// A model on disk and the harness that serves it.
struct Served {
  TinyModel model;
  TemporaryFolder folder;
  std::unique_ptr<Harness> harness;

  explicit Served(const std::string& patch, const Harness::Options& options = {},
                  std::uint32_t seed = 1)
      : model(make_tiny_model(patch, seed)) {
    model.write(folder.path());
    harness = std::make_unique<Harness>(folder.path(), options);
  }
};

class ModelShapes : public ::testing::TestWithParam<const char*> {};

TEST_P(ModelShapes, MatchesTheNaiveReference) {
  Served served(GetParam());
  for (const std::size_t length : {std::size_t{1}, std::size_t{7}, std::size_t{40}}) {
    const Tokens tokens = random_tokens(length, static_cast<std::uint32_t>(length));
    EXPECT_LT(
        relative_error(served.harness->run(tokens, 64), reference_logits(served.model, tokens)),
        1e-5)
        << length << " tokens";
  }
}

INSTANTIATE_TEST_SUITE_P(
    Tiny, ModelShapes,
    ::testing::Values(
        "{}", R"({"tie_word_embeddings": true})", R"({"num_key_value_heads": 4})",
        R"({"num_key_value_heads": 1, "head_dim": 16})",
        R"({"attention_bias": true, "mlp_bias": true})",
        R"({"dtype": "bfloat16", "hidden_size": 36, "intermediate_size": 50, "head_dim": 6})",
        R"({"dtype": "float16", "vocab_size": 64, "num_hidden_layers": 1})",
        R"({"rope_scaling": {"type": "linear", "factor": 2.0}})",
        R"({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32})",
        R"({"rope_scaling": {"type": "llama3", "factor": 4, "low_freq_factor": 1,
            "high_freq_factor": 4, "original_max_position_embeddings": 32}})",
        R"({"rope_scaling": {"type": "yarn", "factor": 4,
            "original_max_position_embeddings": 32}})",
        R"({"architectures": ["MistralForCausalLM"], "sliding_window": null})"));

class CountingBackend : public test::WrappedBackend {
 public:
  CountingBackend() : WrappedBackend(make_backend("cpu")) {}
  Buffer allocate(std::size_t num_bytes) override {
    total += num_bytes;
    return inner().allocate(num_bytes);
  }
  std::int32_t padded_rows(std::int32_t num_rows) const override { return num_rows + 50; }
  std::size_t total = 0;
};

TEST(Model, MeasuresWhatItAllocates) {
  for (const char* patch :
       {"{}", R"({"tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true})",
        R"({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32})"}) {
    const TemporaryFolder folder;
    make_tiny_model(patch, 1).write(folder.path());
    const Checkpoint checkpoint = Checkpoint::open(folder.path());
    const ModelConfig config = ModelConfig::parse(checkpoint.config_json());
    for (const ModelSizes& sizes : {ModelSizes{8, 8}, ModelSizes{100, 20, 17}}) {
      CountingBackend backend;
      const ModelBytes bytes = Model::measure(backend, checkpoint, config, sizes);
      EXPECT_EQ(backend.total, 0u);
      const Model model(backend, checkpoint, config, sizes);
      EXPECT_EQ(bytes.weights, model.weight_bytes());
      EXPECT_EQ(bytes.scratch, model.scratch_bytes());
      EXPECT_EQ(bytes.weights + bytes.scratch, backend.total) << patch;
    }
  }
}

TEST(Model, AStoredTiedHeadChangesNothing) {
  const Tokens tokens = random_tokens(9, 3);
  Served tied(R"({"tie_word_embeddings": true})");
  TinyModel stored = tied.model;
  stored.tensors["lm_head.weight"] = stored.tensors["model.embed_tokens.weight"];
  const TemporaryFolder folder;
  stored.write(folder.path());
  Harness harness(folder.path(), {});
  EXPECT_EQ(harness.run(tokens, 64), tied.harness->run(tokens, 64));
  EXPECT_EQ(harness.model().weight_bytes(), tied.harness->model().weight_bytes());
}

TEST(Model, ChunkedPrefillIsBitwiseTheWhole) {
  for (const char* patch :
       {R"({"dtype": "bfloat16"})",
        R"({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32})"}) {
    Served served(patch);
    const Tokens tokens = random_tokens(45, 5);
    const std::vector<float> whole = served.harness->run(tokens, 64);
    for (const std::size_t chunk : {1U, 3U, 16U, 44U}) {
      EXPECT_EQ(served.harness->run(tokens, chunk), whole) << patch << " chunks of " << chunk;
    }
  }
}

// What runs beside a sequence must not reach its numbers, not even by a rounding.
TEST(Model, ASequenceAloneIsBitwiseTheSameInAMixedBatch) {
  Served served(R"({"dtype": "bfloat16", "attention_bias": true})");
  Harness& harness = *served.harness;
  const Tokens tokens = random_tokens(24, 6);
  const std::vector<float> alone = harness.run(tokens, 64);

  std::mt19937 random(11);
  const std::int32_t id = harness.add_sequence();
  std::vector<float> mixed;
  std::vector<std::int32_t> others;
  for (std::size_t begin = 0; begin < tokens.size();) {
    const std::size_t count = std::min<std::size_t>(1 + draw(random, 6), tokens.size() - begin);
    std::vector<Harness::Chunk> chunks;
    const std::size_t before = draw(random, 3);
    for (std::size_t i = 0; i < before + draw(random, 3); ++i) {
      if (others.size() < 6) others.push_back(harness.add_sequence());
      chunks.push_back({others[i], random_tokens(1 + draw(random, 5), draw(random, 1000))});
    }
    const std::size_t place = std::min(before, chunks.size());
    chunks.insert(
        chunks.begin() + static_cast<std::ptrdiff_t>(place),
        Harness::Chunk{id, Tokens(tokens.begin() + static_cast<std::ptrdiff_t>(begin),
                                  tokens.begin() + static_cast<std::ptrdiff_t>(begin + count))});
    const std::vector<float> part = harness.step(chunks)[place];
    mixed.insert(mixed.end(), part.begin(), part.end());
    begin += count;
  }
  EXPECT_EQ(mixed, alone);
}

TEST(Model, LogitsOfSomeRowsAreThoseOfAll) {
  Served served("{}");
  Harness& harness = *served.harness;
  const std::int32_t a = harness.add_sequence(), b = harness.add_sequence();
  const std::int32_t c = harness.add_sequence(), d = harness.add_sequence();
  const Tokens left = random_tokens(9, 1), right = random_tokens(5, 2);
  const auto all = harness.step({{a, left}, {b, right}});
  const auto last = harness.step({{c, left}, {d, right}}, true);
  const auto vocab = static_cast<std::ptrdiff_t>(served.model.config.vocab_size);
  EXPECT_EQ(last[0], std::vector<float>(all[0].end() - vocab, all[0].end()));
  EXPECT_EQ(last[1], std::vector<float>(all[1].end() - vocab, all[1].end()));
}

TEST(Model, AStepWithoutLogitsStillFillsTheCache) {
  Served served("{}");
  Harness& harness = *served.harness;
  const Tokens tokens = random_tokens(10, 4);
  const std::vector<float> whole = harness.run(tokens, 64);

  // The same ten tokens, the first six in a batch that asks for nothing.
  const std::int32_t id = harness.add_sequence();
  harness.step({{id, Tokens(tokens.begin(), tokens.begin() + 6)}});
  std::vector<std::int32_t> blocks = harness.blocks(id);
  Batch batch;
  for (std::int32_t i = 0; i < 6; ++i) {
    batch.tokens.push_back(tokens[static_cast<std::size_t>(i)]);
    batch.positions.push_back(i);
    batch.cache_slots.push_back(std::int64_t{blocks[static_cast<std::size_t>(i / 4)]} * 4 + i % 4);
    batch.rope_lengths.push_back(6);
  }
  batch.segments = {{harness.model().base(), 0, 6}};
  batch.sequences = {{0, 6, 6, blocks.data()}};
  const KvLayer& last = harness.cache().layer(1);
  const std::size_t bytes = 64U * 2 * 4 * 8 * sizeof(float);
  const std::vector<std::uint8_t> nans(bytes, 0xFF);
  harness.backend().copy_to_device(last.keys, nans.data(), bytes, harness.stream());
  harness.backend().copy_to_device(last.values, nans.data(), bytes, harness.stream());
  EXPECT_EQ(harness.model().forward(batch, harness.cache(), harness.stream()).size(0), 0);

  const std::vector<float> rest = harness.step({{id, Tokens(tokens.begin() + 6, tokens.end())}})[0];
  const auto vocab = static_cast<std::ptrdiff_t>(served.model.config.vocab_size);
  EXPECT_EQ(rest, std::vector<float>(whole.begin() + 6 * vocab, whole.end()));
}

TEST(Model, ABatchThatIsNotWellFormedIsRefusedWithNumbers) {
  Harness::Options options;
  options.max_batch_tokens = 8;
  Served served("{}", options);
  Harness& harness = *served.harness;
  std::vector<std::int32_t> blocks = {0, 1};
  const auto good = [&] {
    Batch batch;
    batch.tokens = {1, 2, 3};
    batch.positions = {0, 1, 2};
    batch.cache_slots = {0, 1, 2};
    batch.rope_lengths = {3, 3, 3};
    batch.segments = {{harness.model().base(), 0, 3}};
    batch.sequences = {{0, 3, 3, blocks.data()}};
    batch.logit_rows = {2};
    return batch;
  };
  const auto refusal = [&](const Batch& batch) {
    return message_of<InvalidArgument>(
        [&] { harness.model().forward(batch, harness.cache(), harness.stream()); });
  };
  EXPECT_EQ(refusal(good()), "");

  Batch batch = good();
  batch.positions.pop_back();
  EXPECT_NE(refusal(batch).find("3 tokens, but 2 positions"), std::string::npos);
  batch = good();
  batch.segments[0].num_rows = 2;
  EXPECT_NE(refusal(batch).find("cover 2 rows of 3"), std::string::npos);
  batch = good();
  batch.segments[0].variant = nullptr;
  EXPECT_NE(refusal(batch).find("segment with a variant"), std::string::npos);
  batch = good();
  batch.logit_rows = {2, 1};
  EXPECT_NE(refusal(batch).find("got 1 after 2"), std::string::npos);
  batch = good();
  batch.logit_rows = {3};
  EXPECT_NE(refusal(batch).find("below 3, got 3"), std::string::npos);
  batch = good();
  batch.positions = {0, 1, 128};
  EXPECT_NE(refusal(batch).find("position 128"), std::string::npos);
  batch = good();
  batch.tokens[1] = 61;
  EXPECT_NE(refusal(batch).find("61"), std::string::npos);
  batch = good();
  batch.tokens.assign(9, 1);
  EXPECT_NE(refusal(batch).find("1 to 8 rows, got 9"), std::string::npos);
  EXPECT_NE(refusal(Batch{}).find("got 0"), std::string::npos);
  EXPECT_EQ(refusal(good()), "");
}

TEST(Model, RefusesACheckpointThatItsConfigDoesNotDescribe) {
  TinyModel model = make_tiny_model("{}", 1);
  model.tensors["model.layers.1.mlp.down_proj.weight"].shape = {48, 32};
  const TemporaryFolder folder;
  model.write(folder.path());
  const std::string message =
      message_of<InvalidArgument>([&] { Harness harness(folder.path(), {}); });
  EXPECT_NE(message.find("'model.layers.1.mlp.down_proj.weight' is [48, 32]"), std::string::npos)
      << message;
  EXPECT_NE(message.find("[32, 48]"), std::string::npos) << message;
}

TEST(Model, NamesItsTensorsForDeltas) {
  Served served(R"({"tie_word_embeddings": true})");
  const std::vector<BaseTensor> tensors =
      Model::base_tensors(Checkpoint::open(served.folder.path()));
  EXPECT_EQ(tensors.size(), served.model.tensors.size());
  for (const BaseTensor& tensor : tensors) {
    EXPECT_EQ(tensor.shape, served.model.tensors.at(tensor.name).shape) << tensor.name;
  }
}

}  // namespace
}  // namespace deltazip
