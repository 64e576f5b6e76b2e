#include "engine/front_desk.h"

#include <gtest/gtest.h>

#include <thread>

#include "engine/harness.h"

namespace deltazip::engine {
namespace {

using test::message_of;

std::shared_ptr<VariantRecord> record(const std::string& name, VariantId id) {
  auto made = std::make_shared<VariantRecord>();
  made->name = name;
  made->id = id;
  return made;
}

Request request(std::int64_t id, const std::string& variant = "") {
  return test::make_request(id, variant, {1}, 1);
}

TEST(FrontDesk, NamesAreCheckedAtTheDoor) {
  for (const char* good : {"a", "sql-v7", "A.b_c:1@x", "-x"}) {
    EXPECT_NO_THROW(check_variant_name(good)) << good;
  }
  for (const std::string bad : {"", ".", "..", ".hidden", "a/b", "../a", "a b", "a\n", "ä"}) {
    EXPECT_THROW(check_variant_name(bad), InvalidArgument) << bad;
  }
  EXPECT_NO_THROW(check_variant_name(std::string(128, 'a')));
  EXPECT_THROW(check_variant_name(std::string(129, 'a')), InvalidArgument);
}

TEST(FrontDesk, ANameLivesFromReservationToErasure) {
  FrontDesk desk(record("base", 0), 10);
  desk.reserve("v");
  EXPECT_THROW(desk.reserve("v"), InvalidArgument);
  EXPECT_THROW((void)desk.find("v"), NotFound) << "not before it is advertised";
  desk.release("v");
  desk.reserve("v");
  const auto v = record("v", 1);
  desk.advertise(v);
  EXPECT_EQ(desk.find("v"), v);
  EXPECT_THROW(desk.reserve("v"), InvalidArgument);
  EXPECT_THROW(desk.reserve("base"), InvalidArgument);
  desk.submit(request(1, "v"));
  desk.retire("v");
  desk.retire("v");  // again: nothing more
  EXPECT_TRUE(desk.is_draining("v"));
  EXPECT_THROW(desk.submit(request(2, "v")), NotFound);
  EXPECT_NE(message_of<InvalidArgument>([&] { desk.reserve("v"); }).find("draining"),
            std::string::npos);
  const auto commands = desk.take();
  ASSERT_EQ(commands.size(), 3u);
  EXPECT_TRUE(std::holds_alternative<AddVariant>(commands[0]));
  EXPECT_TRUE(std::holds_alternative<Submit>(commands[1]));
  EXPECT_TRUE(std::holds_alternative<RemoveVariant>(commands[2]));
  desk.erase(*v);
  EXPECT_FALSE(desk.is_draining("v"));
  EXPECT_NO_THROW(desk.reserve("v"));
  EXPECT_THROW(desk.retire("base"), InvalidArgument);
  EXPECT_THROW(desk.retire("nobody"), NotFound);
}

TEST(FrontDesk, TheQueueIsBoundedWhereverItsRequestsAre) {
  FrontDesk desk(record("base", 0), 3);
  const auto is_full = [&](std::int64_t id) {
    return !message_of<ResourceExhausted>([&] { desk.submit(request(id)); }).empty();
  };
  for (std::int64_t id = 0; id < 3; ++id) EXPECT_FALSE(is_full(id));
  EXPECT_TRUE(is_full(10)) << "in the inbox";
  EXPECT_EQ(desk.take().size(), 3u);
  EXPECT_TRUE(is_full(10)) << "taken, not yet in the statistics";
  EngineStats stats;
  stats.scheduler.num_waiting = 2;
  desk.publish(stats, true);
  EXPECT_FALSE(is_full(10)) << "one of them runs";
  EXPECT_TRUE(is_full(11));
}

TEST(FrontDesk, IdsAreUniqueAmongTheLivingAndCancelledOnce) {
  FrontDesk desk(record("base", 0), 10);
  desk.submit(request(1));
  EXPECT_THROW(desk.submit(request(1)), InvalidArgument);
  for (int i = 0; i < 1000; ++i) desk.cancel(1, kAllChoices);
  desk.cancel(2, kAllChoices);  // unknown
  EXPECT_EQ(desk.take().size(), 2u) << "a storm of cancels is one command";
  desk.cancel(1, 0);
  EXPECT_EQ(desk.take().size(), 0u) << "all of it is cancelled";
  desk.forget(1);
  desk.cancel(1, kAllChoices);
  EXPECT_EQ(desk.take().size(), 0u);
  EXPECT_NO_THROW(desk.submit(request(1)));
}

TEST(FrontDesk, AChoiceIsCancelledOnce) {
  FrontDesk desk(record("base", 0), 10);
  Request many = request(1);
  many.sampling.n = 3;
  desk.submit(many);
  for (int i = 0; i < 1000; ++i) desk.cancel(1, i % 3);
  desk.cancel(1, kAllChoices);
  EXPECT_EQ(desk.take().size(), 1u + 3 + 1);
  EXPECT_THROW(desk.cancel(1, 3), InvalidArgument);
}

TEST(FrontDesk, ProgressIsCountedOnlyWhileThereIsWork) {
  FrontDesk desk(record("base", 0), 10);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(desk.stats().seconds_since_progress, 0.0);
  desk.submit(request(1));
  EXPECT_LT(desk.stats().seconds_since_progress, 0.015);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_GT(desk.stats().seconds_since_progress, 0.015) << "nobody takes it: a stuck engine shows";
  desk.take();
  desk.progress();
  desk.publish({}, false);
  EXPECT_EQ(desk.stats().seconds_since_progress, 0.0);
}

TEST(FrontDesk, AClosedDeskRefusesAndAnswersThoseWhoWait) {
  FrontDesk desk(record("base", 0), 10);
  desk.submit(request(1));
  bool ran = true;
  std::thread caller([&] { ran = desk.call([] {}); });
  while (desk.take().size() < 1) std::this_thread::yield();
  desk.submit(request(2));
  (void)desk.close("the reason");
  caller.join();
  EXPECT_FALSE(ran);
  EXPECT_FALSE(desk.call([] {}));
  EXPECT_FALSE(desk.stats().is_alive);
  EXPECT_NE(message_of<InternalError>([&] { desk.submit(request(3)); }).find("the reason"),
            std::string::npos);
  EXPECT_THROW(desk.reserve("v"), InternalError);
}

}  // namespace
}  // namespace deltazip::engine
