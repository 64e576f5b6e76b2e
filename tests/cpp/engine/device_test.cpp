// The engine on a device that runs apart from the host, and one that is lost.

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "backend/replay_check.h"
#include "engine/harness.h"

namespace deltazip {
namespace {

using test::Answers;
using test::Finish;
using test::make_request;
using test::random_tokens;
using test::TinyHouse;

// Memory of its own, steps that are padded and replayed; the arithmetic is the CPU's.
class ApartDevice : public test::ReplayCheck {
 public:
  ApartDevice() : ReplayCheck({2, {}}) {}
  bool shares_host_memory() const override { return false; }
};

std::vector<Request> mixed_requests() {
  std::vector<Request> requests;
  for (std::uint32_t i = 0; i < 24; ++i) {
    Request request =
        make_request(i, i % 4 == 0 ? "" : "v" + std::to_string(i % 3), random_tokens(2 + i, i), 14);
    request.sampling.temperature = i % 2 == 0 ? 0.0F : 0.9F;
    request.sampling.seed = i;
    request.sampling.n = i % 5 == 0 ? 3 : 1;
    request.sampling.logprobs = i % 3 == 0 ? 2 : -1;
    if (i % 6 == 0) request.sampling.prompt_logprobs = 1;
    requests.push_back(std::move(request));
  }
  return requests;
}

TEST(Device, AnswersAsTheCpuDoes) {
  TinyHouse house;
  const auto answers_on = [&](std::unique_ptr<Backend> backend) {
    const bool is_apart = backend != nullptr;
    Engine engine(house.config(), test::silent, std::move(backend));
    EXPECT_EQ(engine.config().host_budget_bytes > 0, is_apart) << "what is pinned has a bound";
    for (std::uint32_t i = 0; i < 3; ++i) {
      const std::string name = "v" + std::to_string(i);
      engine.add_variant(name, house.write_variant(name, i).string());
    }
    Answers answers = test::ask(engine, mixed_requests());
    engine.check();
    EXPECT_EQ(engine.stats().scheduler.num_free_blocks, engine.stats().scheduler.num_blocks);
    EXPECT_EQ(engine.stats().num_finished, 24);
    return answers;
  };
  const Answers expected = answers_on(nullptr);
  auto device = std::make_unique<ApartDevice>();
  const Answers answers = answers_on(std::move(device));
  ASSERT_EQ(answers.size(), expected.size());
  for (const auto& [key, answer] : answers) {
    const test::Answer& right = expected.at(key);
    EXPECT_EQ(answer.tokens, right.tokens) << key.first << " " << answer.error;
    EXPECT_EQ(answer.finish, right.finish);
    ASSERT_EQ(answer.logprobs.size(), right.logprobs.size());
    for (std::size_t i = 0; i < answer.logprobs.size(); ++i) {
      EXPECT_EQ(answer.logprobs[i].logprob, right.logprobs[i].logprob);
    }
    EXPECT_EQ(answer.prompt_logprobs.size(), right.prompt_logprobs.size());
  }
}

// Fails for good at one of its calls, as a device does that has fallen off the bus.
class LosableDevice : public ApartDevice {
 public:
  explicit LosableDevice(int fails_at) : calls_left_(fails_at) {
    wrapped_ops().on_op = [this](const std::string&) { count(); };
  }
  std::unique_ptr<Stream> create_stream() override {
    return std::make_unique<LosableStream>(*this, ApartDevice::create_stream());
  }
  void run_step(const StepKey&, Stream&, const std::function<void()>& body) override { body(); }
  void arm() { is_armed_ = true; }

 private:
  class LosableStream : public Stream {
   public:
    LosableStream(LosableDevice& device, std::unique_ptr<Stream> inner)
        : device_(device), inner_(std::move(inner)) {}
    void synchronize() override {
      device_.count();
      inner_->synchronize();
    }

   private:
    LosableDevice& device_;
    std::unique_ptr<Stream> inner_;
  };

  void count() {
    if (is_armed_ && --calls_left_ < 0) throw InternalError("the device is lost");
  }
  std::atomic<bool> is_armed_{false};
  std::atomic<int> calls_left_;
};

TEST(Device, ALostDeviceEndsTheEngineLoudlyWhereverItHappens) {
  TinyHouse house;
  const std::string variant = house.write_variant("v0", 1).string();
  for (int fails_at = 0; fails_at < 120; fails_at += fails_at < 30 ? 1 : 7) {
    auto device = std::make_unique<LosableDevice>(fails_at);
    LosableDevice& losable = *device;
    std::string logged;
    Engine engine(
        house.config(),
        [&](LogLevel level, std::string_view message) {
          if (level == LogLevel::kError) logged = message;
        },
        std::move(device));
    engine.add_variant("v0", variant);
    losable.arm();
    constexpr std::size_t kNumRequests = 6;
    std::size_t num_submitted = 0;
    try {
      for (; num_submitted < kNumRequests; ++num_submitted) {
        const auto id = static_cast<std::int64_t>(num_submitted);
        engine.submit(make_request(id, id % 2 == 0 ? "" : "v0", random_tokens(5, 1), 40));
      }
    } catch (const InternalError&) {  // it was over before the last one came
    }
    Answers answers;
    test::collect(engine, num_submitted, answers);
    test::wait_until([&] { return !engine.stats().is_alive; }, "the engine says that it ended");
    EXPECT_TRUE(engine.poll(10, 10'000).empty()) << "closed: nobody waits";
    EXPECT_NE(engine.stats().failure.find("the device is lost"), std::string::npos);
    engine.shutdown();
    EXPECT_NE(logged.find("the device is lost"), std::string::npos) << fails_at;
    for (const auto& [key, answer] : answers) {
      EXPECT_EQ(answer.num_finishes, 1);
      EXPECT_EQ(answer.finish, Finish::kError);
      EXPECT_NE(answer.error.find("the device is lost"), std::string::npos) << answer.error;
    }
    EXPECT_THROW(engine.submit(make_request(99, "", {1}, 1)), InternalError);
  }
}

}  // namespace
}  // namespace deltazip
