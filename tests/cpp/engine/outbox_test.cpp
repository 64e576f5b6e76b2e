#include "engine/outbox.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <thread>

#include "engine/harness.h"

namespace deltazip::engine {
namespace {

using test::Answers;
using test::Finish;

OutputEvent event(std::int64_t id, std::vector<std::int32_t> tokens,
                  Finish finish = Finish::kNone) {
  OutputEvent event;
  event.request_id = id;
  event.tokens = std::move(tokens);
  event.finish = finish;
  return event;
}

TEST(Outbox, MergesWhatNobodyHasReadYet) {
  Outbox outbox;
  for (std::int32_t i = 0; i < 100; ++i) outbox.push({event(1, {i}), event(2, {-i})});
  EXPECT_EQ(outbox.size(), 2u);
  const auto first = outbox.poll(1, 0);
  ASSERT_EQ(first.size(), 1u);
  EXPECT_EQ(first[0].request_id, 1);
  EXPECT_EQ(first[0].tokens.size(), 100u);
  outbox.push({event(1, {100}, Finish::kLength)});
  const auto rest = outbox.poll(10, 0);
  ASSERT_EQ(rest.size(), 2u);
  EXPECT_EQ(rest[0].request_id, 2);
  EXPECT_EQ(rest[1].tokens, std::vector<std::int32_t>{100});
  EXPECT_EQ(rest[1].finish, Finish::kLength);
}

TEST(Outbox, KeepsTwoLivesOfAnIdApart) {
  Outbox outbox;
  outbox.push({event(7, {1}, Finish::kStop)});
  outbox.push({event(7, {2})});
  const auto events = outbox.poll(10, 0);
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].finish, Finish::kStop);
  EXPECT_EQ(events[1].tokens, std::vector<std::int32_t>{2});
}

TEST(Outbox, LosesAndReordersNothing) {
  std::mt19937 random(3);
  Outbox outbox;
  constexpr int kRequests = 20, kTokens = 300;
  std::thread writer([&] {
    std::vector<std::int32_t> next(kRequests, 0);
    for (int left = kRequests * kTokens; left > 0; --left) {
      auto id = static_cast<std::size_t>(random() % kRequests);
      while (next[id] == kTokens) id = (id + 1) % kRequests;
      const std::int32_t token = next[id]++;
      outbox.push({event(static_cast<std::int64_t>(id), {token},
                         token + 1 == kTokens ? Finish::kLength : Finish::kNone)});
    }
    outbox.close();
  });
  Answers answers;
  while (true) {
    auto events = outbox.poll(5, 1000);
    if (events.empty()) break;
    for (OutputEvent& each : events) test::add_event(answers, std::move(each));
  }
  writer.join();
  ASSERT_EQ(answers.size(), static_cast<std::size_t>(kRequests));
  for (const auto& [key, answer] : answers) {
    EXPECT_EQ(answer.finish, Finish::kLength);
    ASSERT_EQ(answer.tokens.size(), static_cast<std::size_t>(kTokens));
    EXPECT_TRUE(std::ranges::is_sorted(answer.tokens));
  }
}

TEST(Outbox, AClosedOneDoesNotWait) {
  Outbox outbox;
  outbox.push({event(1, {5})});
  outbox.close();
  EXPECT_EQ(outbox.poll(10, 60'000).size(), 1u);
  EXPECT_TRUE(outbox.poll(10, 60'000).empty());
}

}  // namespace
}  // namespace deltazip::engine
