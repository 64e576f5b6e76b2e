// Many threads, cancels, full queues: everything ends once, and everything is given back.

#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "deltazip/engine/engine.h"
#include "engine/harness.h"

namespace deltazip {
namespace {

using test::Answers;
using test::Finish;
using test::make_request;
using test::TinyHouse;
using test::Tokens;

void expect_all_given_back(const Engine& engine) {
  engine.check();
  const SchedulerStats stats = engine.stats().scheduler;
  EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
  EXPECT_EQ(stats.num_running + stats.num_waiting, 0);
}

TEST(Stress, ThirtyThreadsSubmitCancelAndPoll) {
  TinyHouse house;
  EngineConfig config = house.config();
  config.num_delta_slots = 1;
  const std::int64_t block_bytes = 2 * 2 * 2 * config.block_size * 8 * 4;
  config.max_model_len = 64;
  config.kv_cache_bytes = 40 * block_bytes;
  Engine engine(config, test::silent);
  engine.add_variant("v", house.write_variant("v", 1).string());
  engine.add_variant("w", house.write_variant("w", 2).string());

  constexpr int kWriters = 24, kReaders = 6, kEach = 12;
  std::atomic<int> num_choices = 0, num_finished = 0;
  std::atomic<bool> all_sent = false;
  std::mutex mutex;
  std::set<std::pair<std::int64_t, std::int32_t>> finished;
  std::vector<std::thread> writers, readers;
  for (int w = 0; w < kWriters; ++w) {
    writers.emplace_back([&, w] {
      std::mt19937 random(static_cast<std::uint32_t>(w));
      for (int i = 0; i < kEach; ++i) {
        const std::int64_t id = 1000 * w + i;
        constexpr const char* kNames[] = {"", "v", "w"};
        Request request = make_request(
            id, kNames[test::draw(random, 3)],
            test::random_tokens(1 + test::draw(random, 30), test::draw(random, 1 << 30)),
            1 + static_cast<std::int32_t>(test::draw(random, 30)));
        request.sampling.n = 1 + static_cast<std::int32_t>(test::draw(random, 2));
        num_choices += request.sampling.n;
        const std::int32_t last_choice = request.sampling.n - 1;
        engine.submit(std::move(request));
        if (test::draw(random, 3) == 0) engine.cancel(id);
        if (test::draw(random, 3) == 0) engine.cancel(id - 1);
        if (test::draw(random, 3) == 0) engine.cancel(id, last_choice);
        if (test::draw(random, 3) == 0) engine.cancel(id - 1, 0);
        if (test::draw(random, 8) == 0) (void)engine.variants();
        if (test::draw(random, 8) == 0) (void)engine.stats();
      }
    });
  }
  for (int r = 0; r < kReaders; ++r) {
    readers.emplace_back([&] {
      while (!all_sent || num_finished < num_choices) {
        for (const OutputEvent& event : engine.poll(7, 20)) {
          if (event.finish == Finish::kNone) continue;
          EXPECT_NE(event.finish, Finish::kError) << event.error;
          const std::lock_guard lock(mutex);
          EXPECT_TRUE(finished.emplace(event.request_id, event.choice).second);
          ++num_finished;
        }
      }
    });
  }
  for (std::thread& thread : writers) thread.join();
  all_sent = true;
  for (std::thread& thread : readers) thread.join();
  EXPECT_EQ(finished.size(), static_cast<std::size_t>(num_choices.load()));
  expect_all_given_back(engine);
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.num_requests, kWriters * kEach);
  EXPECT_EQ(stats.num_finished + stats.num_cancelled, kWriters * kEach);
}

TEST(Stress, CancelsGiveBlocksBackAndAreSaidOnce) {
  TinyHouse house;
  Engine engine(house.config(), test::silent);
  engine.add_variant("v", house.write_variant("v", 1).string());
  constexpr std::int64_t kRequests = 60;
  for (std::int64_t id = 0; id < kRequests; ++id) {
    Request request = make_request(id, id % 2 == 0 ? "" : "v", {1, 2, 3}, 120);
    request.sampling.n = 2;
    engine.submit(std::move(request));
  }
  Answers answers;
  for (OutputEvent& event : engine.poll(64, 1000)) test::add_event(answers, std::move(event));
  for (int again = 0; again < 3; ++again) {
    for (std::int64_t id = -5; id < kRequests + 5; ++id) engine.cancel(id);
  }
  test::collect(engine, 2 * kRequests, answers);
  for (const auto& [key, answer] : answers) EXPECT_EQ(answer.num_finishes, 1);
  EXPECT_TRUE(engine.poll(10, 20).empty());
  expect_all_given_back(engine);
  EXPECT_EQ(engine.stats().num_cancelled + engine.stats().num_finished, kRequests);
  EXPECT_GT(engine.stats().num_cancelled, 0);
}

TEST(Stress, AFullQueueRefusesAndRecovers) {
  TinyHouse house;
  EngineConfig config = house.config();
  config.max_waiting = 3;
  config.max_batch_sequences = 1;
  Engine engine(config, test::silent);
  std::size_t num_accepted = 0, num_refused = 0;
  for (std::int64_t id = 0; id < 200; ++id) {
    try {
      engine.submit(make_request(id, "", {1, 2, 3}, 60));
      ++num_accepted;
    } catch (const ResourceExhausted& error) {
      EXPECT_NE(std::string(error.what()).find("3 requests wait"), std::string::npos);
      ++num_refused;
    }
    EXPECT_LE(engine.stats().scheduler.num_waiting, 3);
  }
  EXPECT_GT(num_refused, 0u);
  Answers answers;
  test::collect(engine, num_accepted, answers);
  EXPECT_EQ(test::ask_one(engine, make_request(1000, "", {1}, 1)).finish, Finish::kLength);
}

TEST(Stress, NobodyReadsAndMemoryIsBoundedByTheTokens) {
  TinyHouse house;
  Engine engine(house.config(), test::silent);
  for (std::int64_t id = 0; id < 100; ++id) engine.submit(make_request(id, "", {1, 2}, 50));
  test::wait_until([&] { return engine.stats().num_finished == 100; }, "all finished");
  const std::vector<OutputEvent> events = engine.poll(1000, 0);
  ASSERT_EQ(events.size(), 100u) << "one merged event for each request";
  for (const OutputEvent& event : events) EXPECT_EQ(event.tokens.size(), 50u);
}

}  // namespace
}  // namespace deltazip
