// The model on a GPU against the definition in double, and step by step against the CPU.

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "backend/cuda_problem.h"
#include "io/safetensors_builder.h"
#include "model/harness.h"
#include "model/tiny_delta.h"
#include "model/tiny_model.h"

namespace deltazip {
namespace {

using namespace test;
using Tokens = std::vector<std::int32_t>;

class ModelOnCuda : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override { DZ_NEEDS_GPU(); }
  // Weights that the device holds exactly, and heads that its attention serves.
  std::string patch(const std::string& more = "") const {
    return "{\"dtype\": \"" + std::string(name(GetParam())) + "\"" +
           (more.find("head_dim") == std::string::npos ? ", \"head_dim\": 64" : "") +
           (more.empty() ? "" : ", ") + more + "}";
  }
  Harness::Options on_cuda() const {
    Harness::Options options;
    options.device = "cuda";
    options.backend.compute_dtype = options.kv_dtype = GetParam();
    options.block_size = 8;
    options.num_blocks = 400;
    return options;
  }
  Harness::Options on_cpu() const {
    Harness::Options options;
    options.block_size = 8;
    options.num_blocks = 400;
    return options;
  }
  // Two layers of about twelve roundings each, of 2^-12 or 2^-9, which attention may amplify.
  double tolerance() const { return GetParam() == DType::kFloat16 ? 5e-3 : 4e-2; }
};
INSTANTIATE_TEST_SUITE_P(DTypes, ModelOnCuda, ::testing::Values(DType::kFloat16, DType::kBFloat16),
                         [](const auto& entry) { return std::string(name(entry.param)); });

constexpr const char* kShapes[] = {
    "",
    R"("tie_word_embeddings": true)",
    R"("num_key_value_heads": 4)",
    R"("num_key_value_heads": 1, "head_dim": 128)",
    R"("num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 96)",
    R"("attention_bias": true, "mlp_bias": true)",
    R"("hidden_size": 36, "intermediate_size": 50)",
    R"("rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32)",
    R"("rope_scaling": {"type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 32})"};

TEST_P(ModelOnCuda, LogitsMatchTheNaiveReference) {
  for (const char* more : kShapes) {
    const TinyModel model = make_tiny_model(patch(more), 1);
    const TemporaryFolder folder;
    model.write(folder.path());
    Harness harness(folder.path(), on_cuda());
    for (const std::size_t length : {1U, 7U, 40U}) {
      const Tokens tokens = random_tokens(length, static_cast<std::uint32_t>(length));
      const std::vector<double> expected = reference_logits(model, tokens);
      EXPECT_LT(relative_error(harness.run(tokens, 64), expected), tolerance())
          << more << ", " << length << " tokens";
      EXPECT_LT(relative_error(harness.run(tokens, 7), expected), tolerance())
          << more << ", " << length << " tokens in chunks of 7";
      EXPECT_LT(relative_error(harness.run(tokens, 1), expected), tolerance())
          << more << ", " << length << " tokens one by one";
    }
  }
}

TEST_P(ModelOnCuda, ADeltaServedIsTheMergedCheckpoint) {
  for (const char* more : {"", R"("tie_word_embeddings": true)",
                           R"("attention_bias": true, "mlp_bias": true, "hidden_size": 48)"}) {
    const TinyModel model = make_tiny_model(patch(more), 1);
    const TemporaryFolder folder;
    model.write(folder.path());
    Harness harness(folder.path(), on_cuda());
    const TinyDelta delta = change_everything(model, 3);
    const DeviceDelta loaded = delta.on(harness.backend(), harness.backend(), model);
    const auto variant = harness.model().bind(loaded);
    const Tokens tokens = random_tokens(30, 4);
    const std::vector<float> got = harness.run(tokens, 64, variant.get());
    EXPECT_LT(relative_error(got, reference_logits(delta.merged(model), tokens)), tolerance())
        << more;
    EXPECT_GT(relative_error(got, reference_logits(model, tokens)), 0.1) << more;
    EXPECT_LT(relative_error(harness.run(tokens, 64), reference_logits(model, tokens)), tolerance())
        << more;
  }
}

// Decode steps of changing sequences and variants, prompts between them: steps are recorded,
// replayed and padded as an engine would have it.
TEST_P(ModelOnCuda, StepsFollowTheCpus) {
  const TinyModel model = make_tiny_model(patch(R"("attention_bias": true)"), 1);
  const TemporaryFolder folder;
  model.write(folder.path());
  Harness cuda(folder.path(), on_cuda()), cpu(folder.path(), on_cpu());
  struct Variant {
    DeviceDelta on_cuda, on_cpu;
    std::shared_ptr<const VariantWeights> cuda, cpu;
  };
  std::vector<Variant> variants(3);
  for (std::uint32_t i = 0; i < 3; ++i) {
    const TinyDelta delta = change_everything(model, 3 + i);
    variants[i].on_cuda = delta.on(cuda.backend(), cuda.backend(), model);
    variants[i].on_cpu = delta.on(cpu.backend(), cpu.backend(), model);
    variants[i].cuda = cuda.model().bind(variants[i].on_cuda);
    variants[i].cpu = cpu.model().bind(variants[i].on_cpu);
  }
  struct Open {
    std::int32_t on_cuda, on_cpu;
    std::size_t variant, length;
  };
  std::vector<Open> open;
  std::mt19937 random(5);
  for (int turn = 0; turn < 60; ++turn) {
    for (std::size_t i = open.size(); i-- > 0;) {
      if (open[i].length < 60 && draw(random, 30) > 0) continue;
      cuda.release(open[i].on_cuda);
      cpu.release(open[i].on_cpu);
      open.erase(open.begin() + static_cast<std::ptrdiff_t>(i));
    }
    while (open.size() < 1 + draw(random, 12)) {
      const std::size_t v = draw(random, 4);
      const bool is_base = v == variants.size();
      open.push_back({cuda.add_sequence(is_base ? nullptr : variants[v].cuda.get()),
                      cpu.add_sequence(is_base ? nullptr : variants[v].cpu.get()), v, 0});
    }
    std::ranges::stable_sort(open, {}, &Open::variant);
    const bool is_decode = draw(random, 4) > 0;
    std::vector<Harness::Chunk> on_cuda, on_cpu;
    for (Open& each : open) {
      const std::size_t count = is_decode ? 1 : 1 + draw(random, 4);
      on_cuda.push_back({each.on_cuda, random_tokens(count, draw(random, 10000))});
      on_cpu.push_back({each.on_cpu, on_cuda.back().tokens});
      each.length += count;
    }
    const auto got = cuda.step(on_cuda, true), expected = cpu.step(on_cpu, true);
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_LT(relative_error(got[i], {expected[i].begin(), expected[i].end()}), 3 * tolerance())
          << "turn " << turn << ", sequence " << i << " of " << got.size();
    }
  }
}

}  // namespace
}  // namespace deltazip
