#include "model/padding.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "backend/replay_check.h"
#include "io/safetensors_builder.h"
#include "model/harness.h"
#include "model/tiny_delta.h"
#include "model/tiny_model.h"
#include "model/weights.h"

namespace deltazip {
namespace {

using namespace test;
using Tokens = std::vector<std::int32_t>;

// Some matrices, tables and norms, so that variants differ in which tasks they have.
TinyDelta change_some(const TinyModel& model, std::uint32_t seed) {
  std::mt19937 random(seed);
  TinyDelta out;
  for (const auto& [name, tensor] : model.tensors) {
    if (draw(random, 4) == 0) continue;
    if (tensor.shape.rank() == 2) {
      out.matrices.emplace(
          name, make_tiny_delta_matrix(DeltaType::kDenseInt4, tensor.shape[0], tensor.shape[1],
                                       0.02F, draw(random, 1000)));
    } else {
      std::vector<float> values = tensor.values;
      for (float& value : values) value += 0.01F * static_cast<float>(draw(random, 41)) - 0.2F;
      out.replaced.emplace(name, std::move(values));
    }
  }
  return out;
}

class Padding : public ::testing::TestWithParam<const char*> {};

// The same random requests on a backend that pads and on one that does not. Variants come and go;
// ReplayCheck holds steps of one key to one sequence of launches.
TEST_P(Padding, ChangesNoBitAndRepeatsItsLaunches) {
  const TinyModel model = make_tiny_model(GetParam(), 1);
  const TemporaryFolder folder;
  model.write(folder.path());
  Harness::Options options;
  options.num_blocks = 400;
  Harness plain(folder.path(), options);
  auto backend = std::make_unique<ReplayCheck>();
  const ReplayCheck& check = *backend;
  Harness padded(folder.path(), options, std::move(backend));

  struct Loaded {
    DeviceDelta on_plain, on_padded;
    std::shared_ptr<const VariantWeights> plain, padded;
  };
  std::vector<Loaded> variants(5);
  std::mt19937 random(3);
  const auto load = [&](Loaded& variant) {
    variant = {};  // the next one may well lie at the same address
    const TinyDelta delta = change_some(model, draw(random, 1000));
    variant.on_plain = delta.on(plain.backend(), plain.backend(), model);
    variant.on_padded = delta.on(padded.backend(), padded.backend(), model);
    variant.plain = plain.model().bind(variant.on_plain);
    variant.padded = padded.model().bind(variant.on_padded);
  };
  for (Loaded& variant : variants) load(variant);

  struct Open {
    std::int32_t on_plain, on_padded;
    std::size_t variant, length;  // variants.size(): the base
  };
  std::vector<Open> open;
  const auto open_one = [&](std::size_t v) {
    const bool is_base = v == variants.size();
    open.push_back({plain.add_sequence(is_base ? nullptr : variants[v].plain.get()),
                    padded.add_sequence(is_base ? nullptr : variants[v].padded.get()), v, 0});
  };
  const auto close_one = [&](std::size_t i) {
    plain.release(open[i].on_plain);
    padded.release(open[i].on_padded);
    open.erase(open.begin() + static_cast<std::ptrdiff_t>(i));
  };
  for (int turn = 0; turn < 150; ++turn) {
    if (draw(random, 15) == 0) {
      const std::size_t changed = draw(random, 5);
      for (std::size_t i = open.size(); i-- > 0;) {
        if (open[i].variant == changed) close_one(i);
      }
      load(variants[changed]);
    }
    for (std::size_t i = open.size(); i-- > 0;) {
      if (open[i].length > 60 || draw(random, 40) == 0) close_one(i);
    }
    while (open.size() < 1 + draw(random, 17)) open_one(draw(random, 6));
    std::ranges::stable_sort(open, {}, &Open::variant);

    const bool is_decode = draw(random, 4) > 0;
    const std::uint32_t share = 1 + draw(random, 4);
    std::vector<Harness::Chunk> on_plain, on_padded;
    for (Open& each : open) {
      if (draw(random, 4) >= share) continue;
      const std::size_t count = is_decode ? 1 : 1 + draw(random, 3);
      on_plain.push_back({each.on_plain, random_tokens(count, draw(random, 10000))});
      on_padded.push_back({each.on_padded, on_plain.back().tokens});
      each.length += count;
    }
    if (on_plain.empty()) continue;
    ASSERT_EQ(plain.step(on_plain, true), padded.step(on_padded, true)) << "turn " << turn;
  }
  EXPECT_GT(check.num_steps, 60);
  EXPECT_GT(check.num_replays, check.num_steps / 2) << check.num_keys() << " keys";
}

INSTANTIATE_TEST_SUITE_P(
    Tiny, Padding,
    ::testing::Values("{}", R"({"attention_bias": true, "mlp_bias": true, "dtype": "bfloat16"})",
                      R"({"rope_scaling": {"type": "dynamic", "factor": 2.0},
                          "max_position_embeddings": 32})"));

TEST(PadDecode, FillsUpWithRowsOfTheBaseThatStoreAndAttendNothing) {
  VariantWeights base, variant;
  variant.id = 1;
  const std::int32_t block = 3;
  const Batch batch = {
      {5, 6}, {7, 8}, {9, 10}, {8, 9}, {{&variant, 0, 2}}, {{0, 1, 8, &block}, {1, 1, 9, &block}},
      {0, 1}};
  ASSERT_TRUE(is_decode(batch));
  Batch padded;
  pad_decode(batch, 4, &base, padded);
  EXPECT_EQ(padded.tokens, (Tokens{5, 6, 0, 0}));
  EXPECT_EQ(padded.positions, (Tokens{7, 8, 0, 0}));
  EXPECT_EQ(padded.cache_slots, (std::vector<std::int64_t>{9, 10, -1, -1}));
  EXPECT_EQ(padded.logit_rows, (Tokens{0, 1, 2, 3}));
  ASSERT_EQ(padded.segments.size(), 2u);
  EXPECT_EQ(padded.segments[1].variant, &base);
  EXPECT_EQ(padded.segments[1].first_row, 2);
  EXPECT_EQ(padded.segments[1].num_rows, 2);
  ASSERT_EQ(padded.sequences.size(), 4u);
  EXPECT_EQ(padded.sequences[3].first_row, 3);
  EXPECT_EQ(padded.sequences[3].num_rows, 0);
  EXPECT_EQ(padded.sequences[3].context_length, 0);
  EXPECT_EQ(padded_task_capacity(padded, &base), 1);
}

TEST(PadDecode, OnlyADecodeOfAllRowsIsOne) {
  VariantWeights base;
  const std::int32_t block = 0;
  Batch batch = {{1, 2}, {0, 0},          {0, 4},
                 {1, 1}, {{&base, 0, 2}}, {{0, 1, 1, &block}, {1, 1, 1, &block}},
                 {0, 1}};
  EXPECT_TRUE(is_decode(batch));
  EXPECT_EQ(padded_task_capacity(batch, &base), 0);
  Batch fewer_logits = batch;
  fewer_logits.logit_rows = {1};
  EXPECT_FALSE(is_decode(fewer_logits));
  Batch swapped = batch;
  std::swap(swapped.sequences[0], swapped.sequences[1]);
  EXPECT_FALSE(is_decode(swapped));
  Batch prefill = batch;
  prefill.sequences = {{0, 2, 2, &block}};
  EXPECT_FALSE(is_decode(prefill));
}

}  // namespace
}  // namespace deltazip
