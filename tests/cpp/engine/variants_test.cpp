// Variants come, go, wait for a slot and fail to load, while others run.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "deltazip/engine/engine.h"
#include "engine/harness.h"

namespace deltazip {
namespace {

using test::Answer;
using test::Answers;
using test::ask;
using test::ask_one;
using test::Finish;
using test::make_request;
using test::TinyHouse;
using test::Tokens;

class VariantsTest : public testing::Test {
 protected:
  TinyHouse house;
  const Tokens prompt = test::random_tokens(9, 21);
};

TEST_F(VariantsTest, ServesTheMergedModel) {
  Engine engine(house.config(), test::silent);
  for (const std::uint32_t seed : {1u, 2u, 3u}) {
    const std::string name = "v" + std::to_string(seed);
    const VariantInfo info = engine.add_variant(name, house.write_variant(name, seed).string());
    EXPECT_EQ(info.parent, "base");
    EXPECT_EQ(info.content_digest.size(), 64u);
    EXPECT_EQ(info.state, "disk");
    const test::TinyModel merged = house.delta(seed).merged(house.model);
    Tokens tokens = prompt;
    for (const std::int32_t token : ask_one(engine, make_request(seed, name, prompt, 12)).tokens) {
      const std::vector<double> all = test::reference_logits(merged, tokens);
      const std::span<const double> last = std::span(all).last(61);
      EXPECT_GT(last[static_cast<std::size_t>(token)], *std::ranges::max_element(last) - 1e-3);
      tokens.push_back(token);
    }
  }
  for (const VariantInfo& info : engine.variants()) EXPECT_EQ(info.state, "resident") << info.name;
}

TEST_F(VariantsTest, MoreVariantsThanSlotsTakeTurns) {
  EngineConfig config = house.config();
  config.num_delta_slots = 2;
  Engine engine(config, test::silent);
  std::vector<Request> requests;
  for (std::uint32_t v = 0; v < 6; ++v) {
    const std::string name = "v" + std::to_string(v);
    engine.add_variant(name, house.write_variant(name, v).string());
    for (int i = 0; i < 4; ++i) {
      requests.push_back(make_request(static_cast<std::int64_t>(10 * v) + i, name, prompt, 6));
    }
  }
  for (const auto& [key, answer] : ask(engine, requests)) {
    EXPECT_EQ(answer.finish, Finish::kLength) << answer.error;
  }
  std::int64_t num_loads = 0, num_evictions = 0;
  for (const VariantInfo& info : engine.variants()) {
    num_loads += info.num_loads;
    num_evictions += info.num_evictions;
    EXPECT_EQ(info.num_running + info.num_waiting, 0);
  }
  EXPECT_GE(num_loads, 6);
  EXPECT_EQ(num_loads - num_evictions, 2) << "two are resident";
  engine.check();
}

TEST_F(VariantsTest, RemovalDrains) {
  Engine engine(house.config(), test::silent);
  engine.add_variant("v", house.write_variant("v", 1).string());
  engine.submit(make_request(1, "v", prompt, 100));
  engine.submit(make_request(2, "v", prompt, 100));
  engine.remove_variant("v");
  EXPECT_THROW(engine.submit(make_request(3, "v", prompt, 1)), NotFound);
  Answers answers;
  test::collect(engine, 2, answers);
  for (const auto& [key, answer] : answers) {
    EXPECT_EQ(answer.finish, Finish::kLength) << "running requests finish";
    EXPECT_EQ(answer.tokens.size(), 100u);
  }
  test::wait_until([&] { return engine.variants().size() == 1; }, "v is gone");
  EXPECT_FALSE(engine.is_draining("v"));
  EXPECT_THROW(engine.remove_variant("v"), NotFound);
  engine.check();
}

TEST_F(VariantsTest, AFileThatChangedAfterItWasAddedFailsItsRequestsOnly) {
  Engine engine(house.config(), test::silent);
  const auto folder = house.write_variant("v", 1);
  engine.add_variant("v", folder.string());
  test::write_file(folder / "delta.safetensors", "something else entirely");
  const Answers answers =
      ask(engine, {make_request(1, "v", prompt, 4), make_request(2, "", prompt, 4),
                   make_request(3, "v", prompt, 4)});
  for (const std::int64_t id : {1, 3}) {
    const Answer& answer = answers.at({id, 0});
    EXPECT_EQ(answer.finish, Finish::kError);
    EXPECT_NE(answer.error.find("variant 'v' could not be loaded"), std::string::npos)
        << answer.error;
    EXPECT_EQ(answer.num_finishes, 1);
  }
  EXPECT_EQ(answers.at({2, 0}).finish, Finish::kLength);
  EXPECT_EQ(ask_one(engine, make_request(4, "v", prompt, 4)).finish, Finish::kError);
  engine.remove_variant("v");
  test::wait_until([&] { return engine.variants().size() == 1; }, "v is gone");
  engine.check();
}

TEST_F(VariantsTest, ComeAndGoUnderLoad) {
  EngineConfig config = house.config();
  config.num_delta_slots = 2;
  Engine engine(config, test::silent);
  std::vector<std::string> paths;
  for (std::uint32_t v = 0; v < 4; ++v) {
    paths.push_back(house.write_variant("v" + std::to_string(v), v).string());
  }
  Tokens expected[4];
  for (std::uint32_t v = 0; v < 4; ++v) {
    engine.add_variant("x", paths[v]);
    expected[v] = ask_one(engine, make_request(v, "x", prompt, 8)).tokens;
    engine.remove_variant("x");
    test::wait_until([&] { return engine.variants().size() == 1; }, "x is gone");
  }

  std::atomic<bool> stop = false;
  std::vector<std::thread> operators;
  for (std::size_t v = 0; v < 4; ++v) {
    operators.emplace_back([&, v] {
      const std::string name = "v" + std::to_string(v);
      while (!stop) {
        engine.add_variant(name, paths[v]);
        std::this_thread::sleep_for(std::chrono::milliseconds(3));
        engine.remove_variant(name);
        while (engine.is_draining(name)) std::this_thread::yield();
      }
    });
  }
  std::map<std::int64_t, std::size_t> sent;
  Answers answers;
  std::int64_t num_refused = 0;
  for (std::int64_t id = 100; sent.size() < 200; ++id) {
    const auto v = static_cast<std::size_t>(id % 4);
    try {
      engine.submit(make_request(id, "v" + std::to_string(v), prompt, 8));
      sent[id] = v;
    } catch (const NotFound&) {
      ++num_refused;
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }
  test::collect(engine, sent.size(), answers);
  stop = true;
  for (std::thread& thread : operators) thread.join();
  for (const auto& [id, v] : sent) {
    const Answer& answer = answers.at({id, 0});
    EXPECT_EQ(answer.tokens, expected[v]) << answer.error;
  }
  test::wait_until([&] { return engine.variants().size() == 1; }, "all are gone");
  engine.check();
  const SchedulerStats stats = engine.stats().scheduler;
  EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
}

TEST_F(VariantsTest, WarmAndColdRequestsShareOneSlot) {
  EngineConfig config = house.config();
  config.num_delta_slots = 1;
  Engine engine(config, test::silent);
  engine.add_variant("v", house.write_variant("v", 1).string());
  engine.add_variant("w", house.write_variant("w", 2).string());
  engine.submit(make_request(1, "", prompt, 110));
  engine.submit(make_request(2, "v", prompt, 4));
  engine.submit(make_request(3, "w", prompt, 4));
  Answers answers;
  test::collect(engine, 3, answers);
  for (const auto& [key, answer] : answers) {
    EXPECT_EQ(answer.finish, Finish::kLength) << answer.error;
  }
}

}  // namespace
}  // namespace deltazip
