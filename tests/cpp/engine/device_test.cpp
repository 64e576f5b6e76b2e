// The engine on a device that runs apart from the host, and one that is lost.

#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
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

// Memory of its own, steps that are padded and replayed, samples that are there when they have been
// waited for and not before, memory that must not go while a step under way reads a delta in it;
// the arithmetic is the CPU's.
class ApartDevice : public test::ReplayCheck {
 public:
  ApartDevice() : ReplayCheck({2, {}}) {
    wrapped_ops().holds_samples = true;
    wrapped_ops().on_deltas = [this](const SbmmParams& deltas, const Stream& stream) {
      const std::lock_guard lock(mutex_);
      for (std::int32_t t = 0; t < deltas.num_tasks; ++t) {
        const SbmmTask& task = deltas.tasks[t];
        if (task.num_rows > 0 && task.delta.data != nullptr) {
          reads_.push_back({wrapped_ops().mark(), &stream, task.delta.data});
        }
      }
    };
  }
  Buffer allocate(std::size_t num_bytes) override {
    auto* const inner = new Buffer(ReplayCheck::allocate(num_bytes));
    void* const data = inner->data();
    return {data, num_bytes, std::shared_ptr<void>(inner, [this, data, num_bytes](void* owned) {
              check_unread(static_cast<const std::byte*>(data), num_bytes);
              delete static_cast<Buffer*>(owned);
            })};
  }
  bool shares_host_memory() const override { return false; }
  std::unique_ptr<Stream> create_stream() override { return std::make_unique<LateStream>(*this); }
  std::unique_ptr<Event> create_event() override { return std::make_unique<LateEvent>(*this); }

 protected:
  virtual void on_wait() {}
  std::atomic<bool> is_lost{false};

 private:
  void passed(std::int64_t mark, const Stream& stream) {
    on_wait();
    wrapped_ops().give_until(mark, stream);
    const std::lock_guard lock(mutex_);
    std::erase_if(reads_,
                  [&](const Read& read) { return read.mark <= mark && read.stream == &stream; });
  }
  void check_unread(const std::byte* data, std::size_t num_bytes) {
    const std::lock_guard lock(mutex_);
    for (const Read& read : reads_) {
      const auto* const at = static_cast<const std::byte*>(read.delta);
      EXPECT_TRUE(is_lost || at < data || at >= data + num_bytes)
          << "a delta goes while a step under way reads it";
    }
  }

  struct Read {
    std::int64_t mark;
    const Stream* stream;
    const void* delta;
  };
  std::mutex mutex_;
  std::vector<Read> reads_;

  class LateStream : public Stream {
   public:
    explicit LateStream(ApartDevice& device) : device_(device) {}
    void synchronize() override { device_.passed(std::numeric_limits<std::int64_t>::max(), *this); }

   private:
    ApartDevice& device_;
  };
  class LateEvent : public Event {
   public:
    explicit LateEvent(ApartDevice& device) : device_(device) {}
    void record(Stream& stream) override {
      stream_ = &stream;
      mark_ = device_.wrapped_ops().set_mark();
    }
    bool is_done() const override { return true; }
    void wait(Stream&) override {}
    double ms_since(const Event&) const override { return 0.0; }
    void synchronize() override { device_.passed(mark_, *stream_); }

   private:
    ApartDevice& device_;
    const Stream* stream_ = nullptr;
    std::int64_t mark_ = -1;
  };
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

// All that may happen while a step is under way and the next is planned: stops that are found late,
// penalties, cancels, preemptions, loads. Each answer is what the CPU gives, step after step.
TEST(Device, PlanningAheadChangesNoAnswer) {
  TinyHouse house;
  EngineConfig config = house.config();
  config.num_delta_slots = 2;
  config.max_model_len = 64;
  config.max_batch_tokens = 24;
  const std::int64_t block_bytes = 2 * 2 * 2 * config.block_size * 8 * 4;
  config.kv_cache_bytes = 28 * block_bytes;
  std::vector<std::filesystem::path> variants;
  for (std::uint32_t i = 0; i < 4; ++i) {
    variants.push_back(house.write_variant("v" + std::to_string(i), i));
  }
  std::int64_t num_preemptions = 0, num_evictions = 0, num_stops = 0;
  for (std::uint32_t seed = 0; seed < 6; ++seed) {
    config.prefill_chunk_tokens = seed % 2 == 0 ? 0 : 5;
    config.max_variant_wait_steps = seed % 3 == 0 ? 64 : 2;  // few: slots are taken from who runs
    const auto answers_on = [&](std::unique_ptr<Backend> backend) {
      const bool is_apart = backend != nullptr;
      Engine engine(config, test::silent, std::move(backend));
      for (std::size_t i = 0; i < variants.size(); ++i) {
        engine.add_variant("v" + std::to_string(i), variants[i].string());
      }
      std::mt19937 random(seed);
      std::size_t num_choices = 0;
      for (std::int64_t id = 0; id < 60; ++id) {
        const std::uint32_t v = test::draw(random, 6);
        Request request =
            make_request(id, v < 4 ? "v" + std::to_string(v) : "",
                         random_tokens(1 + test::draw(random, 30), test::draw(random, 8)),
                         1 + static_cast<std::int32_t>(test::draw(random, 30)));
        SamplingParams& sampling = request.sampling;
        sampling.temperature = test::draw(random, 2) == 0 ? 0.0F : 1.2F;
        sampling.seed = static_cast<std::uint64_t>(id);
        if (test::draw(random, 2) == 0) {
          for (std::int32_t t = 0; t < 6; ++t) {
            sampling.stop_token_ids.push_back(static_cast<std::int32_t>(test::draw(random, 61)));
          }
          sampling.min_tokens =
              std::min(sampling.max_tokens, static_cast<std::int32_t>(test::draw(random, 4)));
        }
        if (test::draw(random, 6) == 0) sampling.n = 2;
        if (test::draw(random, 6) == 0) sampling.frequency_penalty = 0.5F;
        if (test::draw(random, 6) == 0) sampling.logprobs = 2;
        if (test::draw(random, 9) == 0) sampling.prompt_logprobs = 1;
        request.priority = static_cast<std::int32_t>(test::draw(random, 2));
        const bool is_cancelled = test::draw(random, 8) == 0;
        num_choices += static_cast<std::size_t>(sampling.n);
        engine.submit(std::move(request));
        if (is_cancelled) engine.cancel(id);
        if (id % 8 == 0) engine.check();
      }
      Answers answers;
      test::collect(engine, num_choices, answers);
      engine.check();
      const EngineStats stats = engine.stats();
      EXPECT_EQ(stats.scheduler.num_free_blocks, stats.scheduler.num_blocks);
      EXPECT_EQ(stats.scheduler.num_running + stats.scheduler.num_waiting, 0);
      EXPECT_EQ(stats.num_finished + stats.num_cancelled, 60);
      for (const VariantInfo& variant : engine.variants()) {
        EXPECT_EQ(variant.num_running, 0) << variant.name;
        EXPECT_EQ(variant.num_waiting, 0) << variant.name;
        num_evictions += is_apart ? variant.num_evictions : 0;
      }
      num_preemptions += is_apart ? stats.scheduler.num_preemptions : 0;
      return answers;
    };
    const Answers expected = answers_on(nullptr);
    const Answers answers = answers_on(std::make_unique<ApartDevice>());
    ASSERT_EQ(answers.size(), expected.size());
    for (const auto& [key, answer] : answers) {
      const test::Answer& right = expected.at(key);
      EXPECT_EQ(answer.num_finishes, 1);
      if (answer.finish == Finish::kCancelled || right.finish == Finish::kCancelled) {
        const std::size_t length = std::min(answer.tokens.size(), right.tokens.size());
        EXPECT_TRUE(std::equal(answer.tokens.begin(),
                               answer.tokens.begin() + static_cast<std::ptrdiff_t>(length),
                               right.tokens.begin()));
        continue;
      }
      EXPECT_EQ(answer.tokens, right.tokens) << key.first << " " << answer.error;
      EXPECT_EQ(answer.finish, right.finish) << key.first << " " << answer.error;
      EXPECT_EQ(answer.stop_token, right.stop_token);
      EXPECT_EQ(answer.logprobs.size(), right.logprobs.size());
      EXPECT_EQ(answer.prompt_logprobs.size(), right.prompt_logprobs.size());
      num_stops += answer.finish == Finish::kStop ? 1 : 0;
    }
  }
  EXPECT_GT(num_stops, 20);
  EXPECT_GT(num_preemptions, 20);
  EXPECT_GT(num_evictions, 5);
}

// On a device a decode's place is never empty: the next step is launched before the host has seen
// the tokens of the one before.
TEST(Device, TheNextStepIsLaunchedBeforeTheLastIsWaitedFor) {
  class Watched : public ApartDevice {
   public:
    explicit Watched(std::string& calls_out) : calls(calls_out) {
      wrapped_ops().on_op = [this](const std::string& launch) {
        if (is_watched && launch.starts_with("sample")) calls += 's';
      };
    }
    void on_wait() override {
      if (is_watched) calls += 'w';
    }
    std::string& calls;
    std::atomic<bool> is_watched{false};
  };
  TinyHouse house;
  std::string calls;
  auto device = std::make_unique<Watched>(calls);
  Watched& watched = *device;
  Engine engine(house.config(), test::silent, std::move(device));
  watched.is_watched = true;
  EXPECT_EQ(test::ask_one(engine, make_request(1, "", {1, 2, 3}, 6)).tokens.size(), 6u);
  engine.shutdown();
  EXPECT_EQ(calls, "sswswswswsww");
}

TEST(Device, WarmUpRecordsEachKindOfDecode) {
  TinyHouse house;
  for (const bool warms : {false, true}) {
    EngineConfig config = house.config();
    config.warm_up = warms;
    config.max_variants_per_batch = 4;
    auto device = std::make_unique<ApartDevice>();
    const ApartDevice& apart = *device;
    std::string logged;
    Engine engine(
        config,
        [&](LogLevel, std::string_view message) {
          if (message.starts_with("warm-up")) logged = message;
        },
        std::move(device));
    // Rows 4 and 8, with room for no variant, 1, 2 or 4, each once to measure and once to record.
    EXPECT_EQ(apart.num_keys(), warms ? 8u : 0u);
    EXPECT_EQ(apart.num_replays, warms ? 8 : 0);
    EXPECT_EQ(logged.starts_with("warm-up: 8 kinds of decode steps in "), warms) << logged;
    engine.add_variant("v", house.write_variant("v", 1).string());
    (void)test::ask(engine, {make_request(1, "", {1, 2, 3}, 9), make_request(2, "v", {4}, 9)});
    EXPECT_EQ(apart.num_keys() == 8, warms) << "warm: nothing is left to be recorded";
  }
}

class PickyDevice : public ApartDevice {
 public:
  void check_model(const ModelShape& shape) const override {
    asked = true;
    DZ_CHECK(shape.cache.head_dim == 999, "the device serves head_dim 999, got ",
             shape.cache.head_dim, " of ", shape.cache.num_kv_heads, " heads in ",
             shape.cache.block_size, ", ", name(shape.dtype), ", ", shape.vocab_size);
  }
  static inline bool asked = false;
};

TEST(Device, AModelItCannotServeIsRefusedAtStart) {
  TinyHouse house;
  try {
    const Engine engine(house.config(), test::silent, std::make_unique<PickyDevice>());
    FAIL() << "it started";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(),
                 "the device serves head_dim 999, got 8 of 2 heads in 4, float32, 61");
  }
  EXPECT_TRUE(PickyDevice::asked);
}

// Fails for good at one of its calls, as a device does that has fallen off the bus.
class LosableDevice : public ApartDevice {
 public:
  explicit LosableDevice(int fails_at) : calls_left_(fails_at) {
    wrapped_ops().on_op = [this](const std::string&) { count(); };
  }
  void run_step(const StepKey&, Stream&, const std::function<void()>& body) override { body(); }
  void arm() { is_armed_ = true; }

 private:
  void on_wait() override { count(); }
  void count() {
    if (!is_armed_ || --calls_left_ >= 0) return;
    is_lost = true;
    throw InternalError("the device is lost");
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
