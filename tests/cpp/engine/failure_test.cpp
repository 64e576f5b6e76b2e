// A request's failure ends that request; the engine's failure is loud and leaves nobody waiting.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "deltazip/engine/engine.h"
#include "deltazip/io/checkpoint.h"
#include "engine/harness.h"
#include "engine/loop.h"

namespace deltazip {
namespace {

using test::Answer;
using test::Answers;
using test::Finish;
using test::make_request;
using test::TinyHouse;
using test::Tokens;

TEST(Failure, LogitsThatAreNotFiniteEndThatRequestOnly) {
  TinyHouse house;
  constexpr std::int32_t kPoison = 7;  // its embedding is NaN
  std::vector<float>& table = house.model.tensors.at("model.embed_tokens.weight").values;
  for (std::size_t i = 0; i < 32; ++i) {
    table[kPoison * 32 + i] = std::numeric_limits<float>::quiet_NaN();
  }
  house.model.write(house.base());
  EngineConfig config = house.config();
  const std::int64_t block_bytes = 2 * 2 * 2 * config.block_size * 8 * 4;
  config.kv_cache_bytes = 40 * block_bytes;  // so that poisoned blocks are used again
  Engine engine(config, test::silent);

  const Tokens clean = {1, 2, 3, 4, 5, 6, 8, 9, 10};
  Tokens poisoned = clean;
  poisoned[4] = kPoison;
  const Tokens expected = test::ask_one(engine, make_request(1, "", clean, 20)).tokens;
  ASSERT_EQ(std::ranges::count(expected, kPoison), 0);
  std::vector<Request> requests;
  for (std::int64_t id = 10; id < 60; ++id) {
    requests.push_back(make_request(id, "", id % 2 == 0 ? clean : poisoned, 20));
    requests.back().sampling.n = id % 3 == 0 ? 2 : 1;
    if (id % 5 == 0) requests.back().sampling.prompt_logprobs = 0;
    requests.back().sampling.logit_bias = {{kPoison, -1000.0F}};
  }
  for (const auto& [key, answer] : test::ask(engine, requests)) {
    if (key.first % 2 == 0) {
      EXPECT_EQ(answer.tokens, expected) << key.first << " " << answer.error;
    } else {
      EXPECT_EQ(answer.finish, Finish::kError);
      EXPECT_EQ(answer.num_finishes, 1);
      EXPECT_NE(answer.error.find("request " + std::to_string(key.first)), std::string::npos);
      EXPECT_NE(answer.error.find("not finite"), std::string::npos) << answer.error;
    }
  }
  engine.check();
  EXPECT_EQ(engine.stats().num_errors, 25);
  EXPECT_EQ(engine.stats().scheduler.num_free_blocks, engine.stats().scheduler.num_blocks);
}

TEST(Failure, AFailedStepEndsTheEngineLoudly) {
  TinyHouse house;
  engine::Resources resources(house.config(), test::silent);
  // A model that takes fewer rows than the scheduler was told: a step of ours that must fail.
  resources.model = std::make_unique<Model>(*resources.backend, Checkpoint::open(house.base()),
                                            resources.model_config, ModelSizes{4, 4});
  engine::FrontDesk desk(resources.base_record(), 100);
  engine::Outbox outbox;
  std::string logged;
  engine::Loop loop(resources, desk, outbox, [&](LogLevel level, std::string_view message) {
    if (level == LogLevel::kError) logged = message;
  });
  desk.submit(make_request(1, "", {1, 2}, 2));
  desk.submit(make_request(2, "", test::random_tokens(20, 1), 2));
  Request many = make_request(3, "", {1, 2}, 100);
  many.sampling.n = 2;
  desk.submit(many);
  loop.join();

  EXPECT_NE(logged.find("the engine has stopped"), std::string::npos);
  const EngineStats stats = desk.stats();
  EXPECT_FALSE(stats.is_alive);
  EXPECT_NE(stats.failure, "");
  Answers answers;
  for (OutputEvent& event : outbox.poll(100, 10'000)) test::add_event(answers, std::move(event));
  EXPECT_TRUE(outbox.poll(100, 10'000).empty()) << "closed: nobody waits";
  for (const auto& key :
       std::vector<std::pair<std::int64_t, std::int32_t>>{{2, 0}, {3, 0}, {3, 1}}) {
    EXPECT_EQ(answers[key].finish, Finish::kError);
    EXPECT_NE(answers[key].error.find(stats.failure), std::string::npos);
  }
  EXPECT_NE(answers.at({1, 0}).finish, Finish::kNone);
  EXPECT_THROW(desk.submit(make_request(4, "", {1}, 1)), InternalError);
}

TEST(Failure, ShutdownEndsWhatIsLeftAsCancelled) {
  TinyHouse house;
  Engine engine(house.config(), test::silent);
  for (std::int64_t id = 0; id < 50; ++id) {
    Request request = make_request(id, "", {1, 2, 3}, 100);
    request.sampling.n = id % 5 == 0 ? 3 : 1;
    engine.submit(std::move(request));
  }
  engine.shutdown();
  engine.shutdown();  // again: nothing
  Answers answers;
  test::collect(engine, 70, answers);
  EXPECT_EQ(answers.size(), 70u);
  for (const auto& [key, answer] : answers) {
    EXPECT_EQ(answer.num_finishes, 1);
    EXPECT_TRUE(answer.finish == Finish::kCancelled || answer.finish == Finish::kLength);
  }
  EXPECT_TRUE(engine.poll(10, 10'000).empty());
  EXPECT_THROW(engine.submit(make_request(99, "", {1}, 1)), InternalError);
  EXPECT_THROW(engine.add_variant("v", "nowhere"), InternalError);
  engine.cancel(1);
  engine.check();
  EXPECT_FALSE(engine.stats().is_alive);
  EXPECT_EQ(engine.stats().failure, "");
  EXPECT_EQ(engine.stats().scheduler.num_free_blocks, engine.stats().scheduler.num_blocks);
}

TEST(Failure, DestructionWithWorkUnderWay) {
  TinyHouse house;
  for (int i = 0; i < 10; ++i) {
    Engine engine(house.config(), test::silent);
    const auto folder = house.write_variant("v", 1);
    engine.add_variant("v", folder.string());
    for (std::int64_t id = 0; id < 10; ++id) {
      engine.submit(make_request(id, id % 2 == 0 ? "" : "v", {1, 2, 3}, 100));
    }
  }
}

}  // namespace
}  // namespace deltazip
