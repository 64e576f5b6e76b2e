// Whatever else runs, a request's tokens are those it gets alone.

#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "deltazip/engine/engine.h"
#include "engine/harness.h"

namespace deltazip {
namespace {

using test::Answers;
using test::ask;
using test::make_request;
using test::TinyHouse;
using test::Tokens;

class MixedBatch : public testing::Test {
 protected:
  static constexpr const char* kVariants[] = {"", "one", "two"};

  void add_variants(Engine& engine) {
    engine.add_variant("one", one.string());
    engine.add_variant("two", two.string());
  }

  // Prompts with shared beginnings, greedy and sampled, long and short, some with choices.
  std::vector<Request> requests(std::uint32_t seed, int count) const {
    std::mt19937 random(seed);
    const Tokens common = test::random_tokens(24, 77);
    std::vector<Request> made;
    for (int i = 0; i < count; ++i) {
      const auto shared = static_cast<std::ptrdiff_t>(test::draw(random, 25));
      Tokens prompt(common.begin(), common.begin() + shared);
      for (const std::int32_t token :
           test::random_tokens(1 + test::draw(random, 20), test::draw(random, 1 << 30))) {
        prompt.push_back(token);
      }
      Request request = make_request(i, kVariants[test::draw(random, 3)], std::move(prompt),
                                     10 + static_cast<std::int32_t>(test::draw(random, 22)));
      request.priority = static_cast<std::int32_t>(test::draw(random, 3));
      if (test::draw(random, 2) == 0) {
        request.sampling.temperature = 1.3F;
        request.sampling.seed = random();
        request.sampling.top_p = 0.95F;
        request.sampling.repetition_penalty = 1.1F;
        request.sampling.frequency_penalty = 0.2F;
      }
      request.sampling.n = test::draw(random, 5) == 0 ? 3 : 1;
      request.sampling.prompt_logprobs = test::draw(random, 6) == 0 ? 1 : -1;
      made.push_back(std::move(request));
    }
    return made;
  }

  TinyHouse house;
  const std::filesystem::path one = house.write_variant("one", 11);
  const std::filesystem::path two = house.write_variant("two", 12);
};

TEST_F(MixedBatch, EqualsEachAlone) {
  for (const std::uint32_t seed : {1u, 2u, 3u}) {
    const std::vector<Request> all = requests(seed, 24);
    Answers alone;
    {
      EngineConfig config = house.config();
      config.prefix_caching = false;
      config.max_batch_tokens = 128;
      Engine engine(config, test::silent);
      add_variants(engine);
      for (const Request& request : all) alone.merge(ask(engine, {request}));
    }
    EngineConfig config = house.config();
    config.max_model_len = 76;
    config.max_batch_tokens = 20;
    config.num_delta_slots = 1;  // the variants take turns
    config.prefill_chunk_tokens = seed == 2 ? 6 : 0;
    const std::int64_t block_bytes = 2 * 2 * 2 * config.block_size * 8 * 4;
    config.kv_cache_bytes = 29 * block_bytes;  // a longest sequence and a half
    Engine engine(config, test::silent);
    add_variants(engine);
    std::mt19937 random(seed);
    std::size_t num_choices = 0;
    Answers mixed;
    for (const Request& request : all) {
      num_choices += static_cast<std::size_t>(request.sampling.n);
      engine.submit(request);
      // A burst that the cache cannot hold, then stragglers.
      if (request.id < 16) continue;
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
      if (seed == 3) engine.set_prefill_chunk_tokens(static_cast<std::int32_t>(random() % 8));
    }
    test::collect(engine, num_choices, mixed);
    ASSERT_EQ(mixed.size(), alone.size());
    for (const auto& [key, answer] : mixed) {
      EXPECT_EQ(answer.tokens, alone.at(key).tokens)
          << "seed " << seed << ", request " << key.first << ", choice " << key.second << ": "
          << answer.error;
      ASSERT_EQ(answer.prompt_logprobs.size(), alone.at(key).prompt_logprobs.size());
      for (std::size_t i = 1; i < answer.prompt_logprobs.size(); ++i) {
        EXPECT_EQ(answer.prompt_logprobs[i]->logprob, alone.at(key).prompt_logprobs[i]->logprob);
      }
    }
    engine.check();
    const SchedulerStats stats = engine.stats().scheduler;
    EXPECT_GT(stats.num_preemptions, 0) << "the cache was too large for this test";
    EXPECT_GT(stats.prefix_hit_tokens, 0);
    EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
  }
}

TEST_F(MixedBatch, PrefixesAreSharedByContentAndSaltOnly) {
  Engine engine(house.config(), test::silent);
  add_variants(engine);
  engine.add_variant("one-again", one.string());
  const Tokens prompt = test::random_tokens(22, 4);  // five full blocks and two tokens
  std::int64_t id = 0;
  const auto cached = [&](const std::string& variant, const std::string& salt) {
    Request request = make_request(++id, variant, prompt, 2);
    request.cache_salt = salt;
    return test::ask_one(engine, std::move(request)).num_cached_prompt_tokens;
  };
  EXPECT_EQ(cached("", ""), 0);
  EXPECT_EQ(cached("", ""), 20);
  EXPECT_EQ(cached("", "tenant"), 0);
  EXPECT_EQ(cached("", "tenant"), 20);
  EXPECT_EQ(cached("one", ""), 0);
  EXPECT_EQ(cached("two", ""), 0);
  EXPECT_EQ(cached("one", ""), 20);
  EXPECT_EQ(cached("one-again", ""), 20) << "the same content under another name";
}

TEST_F(MixedBatch, TheSameNameWithOtherContentFindsNoOldBlocks) {
  Engine engine(house.config(), test::silent);
  const Tokens prompt = test::random_tokens(22, 4);
  engine.add_variant("v", one.string());
  const Tokens old_tokens = test::ask_one(engine, make_request(1, "v", prompt, 12)).tokens;
  engine.remove_variant("v");
  test::wait_until([&] { return engine.variants().size() == 1; }, "v is gone");
  engine.add_variant("v", two.string());
  const test::Answer answer = test::ask_one(engine, make_request(2, "v", prompt, 12));
  EXPECT_EQ(answer.num_cached_prompt_tokens, 0);
  Engine fresh(house.config(), test::silent);
  fresh.add_variant("w", two.string());
  EXPECT_EQ(answer.tokens, test::ask_one(fresh, make_request(1, "w", prompt, 12)).tokens);
  EXPECT_NE(answer.tokens, old_tokens) << "two random deltas that speak alike prove nothing";
}

}  // namespace
}  // namespace deltazip
