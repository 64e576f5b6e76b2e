// The engine on a GPU: variants mixed in one batch, preempted and swapped, choose what the
// definition chooses.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "backend/cuda_problem.h"
#include "engine/harness.h"

namespace deltazip {
namespace {

using test::Answers;
using test::Finish;
using test::make_request;
using test::TinyHouse;
using test::Tokens;

constexpr const char* kVariants[] = {"", "one", "two", "three"};

class EngineOnCuda : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { DZ_NEEDS_GPU(); }
  EngineConfig config() const {
    EngineConfig config = house.config();
    config.device = "cuda";
    config.dtype = GetParam();
    config.block_size = 8;
    config.delta_budget_bytes = 0;
    config.num_delta_slots = 4;
    return config;
  }
  void add_variants(Engine& engine) const {
    for (std::uint32_t v = 1; v < std::size(kVariants); ++v) {
      engine.add_variant(kVariants[v], house.write_variant(kVariants[v], 10 + v).string());
    }
  }
  std::vector<Request> requests(std::uint32_t seed, std::int64_t count) const {
    std::mt19937 random(seed);
    const Tokens common = test::random_tokens(24, 77);
    std::vector<Request> made;
    for (std::int64_t i = 0; i < count; ++i) {
      Tokens prompt(common.begin(), common.begin() + static_cast<int>(test::draw(random, 25)));
      const Tokens own = test::random_tokens(1 + test::draw(random, 20), test::draw(random, 10000));
      prompt.insert(prompt.end(), own.begin(), own.end());
      made.push_back(make_request(i, kVariants[test::draw(random, 4)], std::move(prompt),
                                  10 + static_cast<std::int32_t>(test::draw(random, 22))));
    }
    return made;
  }
  // Every greedy token is the likeliest in double arithmetic, or within rounding of it.
  void expect_greedy(const std::vector<Request>& all, const Answers& answers) const;

  TinyHouse house{"{\"head_dim\": 64, \"dtype\": \"" + GetParam() + "\"}"};
};
INSTANTIATE_TEST_SUITE_P(DTypes, EngineOnCuda, ::testing::Values("float16", "bfloat16"),
                         [](const auto& entry) { return entry.param; });

void EngineOnCuda::expect_greedy(const std::vector<Request>& all, const Answers& answers) const {
  const double rounding = GetParam() == "float16" ? 0.006 : 0.05;  // of the largest logit
  int num_choices = 0, num_clear = 0;
  for (const Request& request : all) {
    const test::Answer& answer = answers.at({request.id, 0});
    ASSERT_EQ(answer.finish, Finish::kLength) << answer.error;
    ASSERT_EQ(static_cast<std::int32_t>(answer.tokens.size()), request.sampling.max_tokens);
    std::uint32_t v = 0;
    while (request.variant != kVariants[v]) ++v;
    Tokens tokens = request.prompt;
    tokens.insert(tokens.end(), answer.tokens.begin(), answer.tokens.end() - 1);
    const std::vector<double> logits = test::reference_logits(
        v == 0 ? house.model : house.delta(10 + v).merged(house.model), tokens);
    const auto vocab = static_cast<std::size_t>(house.model.config.vocab_size);
    for (std::size_t i = 0; i < answer.tokens.size(); ++i) {
      const double* row = logits.data() + (request.prompt.size() - 1 + i) * vocab;
      std::vector<double> sorted(row, row + vocab);
      std::ranges::sort(sorted, std::greater());
      const double largest = std::max(std::abs(sorted.front()), std::abs(sorted.back()));
      const double chosen = row[answer.tokens[i]];
      ASSERT_GE(chosen, sorted[0] - rounding * largest)
          << "request " << request.id << " of '" << request.variant << "', token " << i;
      ++num_choices;
      num_clear += sorted[0] - sorted[1] > rounding * largest ? 1 : 0;
    }
  }
  EXPECT_GT(num_clear, num_choices / 2) << "of " << num_choices << " choices few are clear";
}

TEST_P(EngineOnCuda, AMixedBatchChoosesWhatTheDefinitionChooses) {
  for (const std::uint32_t seed : {1U, 2U}) {
    Engine engine(config(), test::silent);
    EXPECT_NE(engine.device_description().find(GetParam()), std::string::npos);
    add_variants(engine);
    const std::vector<Request> all = requests(seed, 40);
    expect_greedy(all, test::ask(engine, all));
    engine.check();
    EXPECT_EQ(engine.stats().scheduler.num_free_blocks, engine.stats().scheduler.num_blocks);
  }
}

// Two slots for three variants and a cache for a few sequences: loads, evictions, preemptions.
TEST_P(EngineOnCuda, PressureChangesNoChoice) {
  EngineConfig config = this->config();
  config.num_delta_slots = 2;
  config.max_model_len = 80;
  config.max_batch_tokens = 20;
  const std::int64_t block_bytes = 2 * 2 * 2 * config.block_size * 64 * 2;
  config.kv_cache_bytes = 15 * block_bytes;
  Engine engine(config, test::silent);
  add_variants(engine);
  const std::vector<Request> all = requests(3, 40);
  expect_greedy(all, test::ask(engine, all));
  engine.check();
  const SchedulerStats stats = engine.stats().scheduler;
  EXPECT_GT(stats.num_preemptions, 0) << "the cache was too large for this test";
  EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
}

// Draws, choices, penalties, scores and cancels: everything ends, and is given back.
TEST_P(EngineOnCuda, SampledRequestsEndAndGiveEverythingBack) {
  Engine engine(config(), test::silent);
  add_variants(engine);
  std::vector<Request> all = requests(4, 48);
  std::size_t num_choices = 0;
  for (Request& request : all) {
    request.sampling.temperature = 1.1F;
    request.sampling.seed = static_cast<std::uint64_t>(request.id);
    request.sampling.top_p = 0.9F;
    request.sampling.top_k = request.id % 3 == 0 ? 20 : 0;
    request.sampling.repetition_penalty = 1.1F;
    request.sampling.frequency_penalty = 0.2F;
    request.sampling.logprobs = request.id % 2 == 0 ? 3 : -1;
    request.sampling.prompt_logprobs = request.id % 6 == 0 ? 1 : -1;
    request.sampling.n = request.id % 5 == 0 ? 3 : 1;
    num_choices += static_cast<std::size_t>(request.sampling.n);
    engine.submit(request);
    if (request.id % 7 == 6) engine.cancel(request.id - 3);
  }
  Answers answers;
  test::collect(engine, num_choices, answers);
  for (const auto& [key, answer] : answers) {
    EXPECT_TRUE(answer.finish == Finish::kLength || answer.finish == Finish::kCancelled)
        << key.first << ": " << answer.error;
    for (const TokenLogprobs& each : answer.logprobs) {
      EXPECT_TRUE(std::isfinite(each.logprob) && each.logprob <= 0.0F) << key.first;
      EXPECT_EQ(each.top.size(), 3u);
    }
  }
  engine.check();
  test::wait_until(
      [&] {
        return engine.stats().scheduler.num_free_blocks == engine.stats().scheduler.num_blocks;
      },
      "all blocks are free");
}

// The same seeds on the same engine: the same draws, alone or among others.
TEST_P(EngineOnCuda, TheSameRequestIsAnsweredTheSame) {
  Engine engine(config(), test::silent);
  add_variants(engine);
  Request request = make_request(1, "two", test::random_tokens(20, 9), 24);
  request.sampling.temperature = 1.0F;
  request.sampling.seed = 5;
  const Tokens first = test::ask_one(engine, request).tokens;
  EXPECT_EQ(test::ask_one(engine, request).tokens, first);
  EXPECT_EQ(first.size(), 24u);
}

// Found out at start: at the first step it would end the engine.
TEST_P(EngineOnCuda, WhatNoKernelServesIsRefusedAtStart) {
  const auto refusal = [&](const TinyHouse& some_house, const EngineConfig& wrong) -> std::string {
    EngineConfig config = wrong;
    config.base = some_house.base().string();
    try {
      const Engine engine(config, test::silent);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "nothing";
  };
  const TinyHouse narrow("{\"head_dim\": 16, \"dtype\": \"" + GetParam() + "\"}");
  EXPECT_NE(refusal(narrow, config()).find("head_dim 64, 96, 128 and 256, got 16"),
            std::string::npos)
      << refusal(narrow, config());
  EngineConfig wrong = config();
  wrong.block_size = 12;
  EXPECT_NE(refusal(house, wrong).find("multiple of 8, got 12"), std::string::npos)
      << refusal(house, wrong);
  wrong = config();
  wrong.kv_dtype = "float32";
  EXPECT_NE(refusal(house, wrong).find("got float32"), std::string::npos) << refusal(house, wrong);
}

}  // namespace
}  // namespace deltazip
