// Bad input: a clear error at the door, and nothing else disturbed.

#include <gtest/gtest.h>

#include <functional>

#include "backend/wrapped_backend.h"
#include "deltazip/engine/engine.h"
#include "deltazip/io/checkpoint.h"
#include "engine/harness.h"

namespace deltazip {
namespace {

using test::make_request;
using test::message_of;
using test::TinyDelta;
using test::TinyHouse;

TEST(BadInput, RequestsAreRefusedWithTheNumbers) {
  TinyHouse house;
  EngineConfig config = house.config();
  config.max_model_len = 64;
  Engine engine(config, test::silent);
  const auto error = [&](const std::function<void(Request&)>& change) {
    Request request = make_request(1, "", {1, 2, 3}, 4);
    change(request);
    return message_of<InvalidArgument>([&] { engine.submit(request); });
  };
  EXPECT_NE(error([](Request& r) { r.prompt.clear(); }).find("empty"), std::string::npos);
  EXPECT_NE(error([](Request& r) { r.prompt = {61}; }).find("vocabulary of 61"), std::string::npos);
  EXPECT_NE(error([](Request& r) { r.prompt = {-1}; }).find("token -1"), std::string::npos);
  EXPECT_NE(error([](Request& r) { r.prompt.assign(61, 1); }).find("together 65"),
            std::string::npos);
  EXPECT_NE(error([](Request& r) { r.sampling.n = 9; }).find("max_batch_sequences is 8"),
            std::string::npos);
  EXPECT_NE(error([](Request& r) { r.sampling.temperature = -1; }).find("temperature"),
            std::string::npos);
  EXPECT_THROW(engine.submit(make_request(1, "nobody", {1}, 1)), NotFound);
  EXPECT_THROW(engine.poll(0, 0), InvalidArgument);
  EXPECT_THROW(engine.poll(1, -1), InvalidArgument);
  EXPECT_EQ(test::ask_one(engine, make_request(1, "base", {1, 2, 3}, 61)).tokens.size(), 61u)
      << "exactly max_model_len is welcome";
}

TEST(BadInput, ConfigsAreRefusedWithTheRange) {
  TinyHouse house;
  const auto error = [&](const std::function<void(EngineConfig&)>& change) {
    EngineConfig config = house.config();
    change(config);
    return message_of<InvalidArgument>([&] { Engine engine(config, test::silent); });
  };
  EXPECT_EQ(error([](EngineConfig&) {}), "");
  const std::vector<std::pair<const char*, std::function<void(EngineConfig&)>>> cases = {
      {"base must name", [](auto& c) { c.base = ""; }},
      {"/nowhere/at/all", [](auto& c) { c.base = "/nowhere/at/all"; }},
      {"a variant's name", [](auto& c) { c.base_name = "a/b"; }},
      {"device", [](auto& c) { c.device = "abacus"; }},
      {"num_threads", [](auto& c) { c.num_threads = -1; }},
      {"dtype", [](auto& c) { c.dtype = "bfloat16"; }},  // the CPU computes in float32
      {"float16 or bfloat16 on device 'cuda', got 'float32'",
       [](auto& c) { c.device = "cuda", c.dtype = "float32"; }},
      {"kv_dtype", [](auto& c) { c.kv_dtype = "int4"; }},
      {"block_size", [](auto& c) { c.block_size = 0; }},
      {"max_batch_tokens", [](auto& c) { c.max_batch_tokens = -1; }},
      {"max_batch_sequences", [](auto& c) { c.max_batch_sequences = -1; }},
      {"num_delta_slots", [](auto& c) { c.num_delta_slots = -1; }},
      {"prefill_chunk_tokens must be in [0, 131072], got -1",
       [](auto& c) { c.prefill_chunk_tokens = -1; }},
      {"max_waiting", [](auto& c) { c.max_waiting = 0; }},
      {"positions end at 128", [](auto& c) { c.max_model_len = 129; }},
      {"memory budget", [](auto& c) { c.memory_budget_bytes = 1; }},
      {"holds 16 tokens", [](auto& c) { c.kv_cache_bytes = 5000, c.max_model_len = 100; }},
  };
  for (const auto& [message, change] : cases) {
    const std::string got = error(change);
    EXPECT_NE(got.find(message), std::string::npos) << "expected " << message << ", got " << got;
  }
}

// A device whose memory is a number. It may hold less than it says.
class SmallDevice : public test::WrappedBackend {
 public:
  SmallDevice(std::size_t free_bytes, std::size_t largest)
      : WrappedBackend(make_backend("cpu", {2, {}})), free_bytes_(free_bytes), largest_(largest) {}
  MemoryInfo memory_info() const override { return {free_bytes_, free_bytes_}; }
  Buffer allocate(std::size_t num_bytes) override {
    if (num_bytes > largest_) throw ResourceExhausted("the device is full");
    ++num_allocations;
    return inner().allocate(num_bytes);
  }
  static inline int num_allocations = 0;

 private:
  std::size_t free_bytes_, largest_;
};

TEST(BadInput, ADeviceThatIsTooSmallSaysWhatFits) {
  TinyHouse house;
  EngineConfig config = house.config();
  config.kv_cache_bytes = 0;
  config.max_batch_tokens = 256;
  const auto start = [&](std::size_t free_bytes, std::size_t largest) {
    SmallDevice::num_allocations = 0;
    Engine engine(config, test::silent, std::make_unique<SmallDevice>(free_bytes, largest));
  };
  EXPECT_NO_THROW(start(8 << 20, 8 << 20));
  EXPECT_GT(SmallDevice::num_allocations, 0);
  const std::string no_scratch = message_of<InvalidArgument>([&] { start(400'000, 1 << 20); });
  EXPECT_NE(no_scratch.find("lower max_batch_tokens: "), std::string::npos) << no_scratch;
  const std::string no_weights = message_of<InvalidArgument>([&] { start(10'000, 1 << 20); });
  EXPECT_NE(no_weights.find("a larger device"), std::string::npos) << no_weights;
  EXPECT_EQ(SmallDevice::num_allocations, 0) << "known before anything was loaded";
  const std::string refused = message_of<ResourceExhausted>([&] { start(8 << 20, 200'000); });
  EXPECT_NE(refused.find("no memory for the KV cache, although"), std::string::npos) << refused;
}

TEST(BadInput, VariantsAreRefusedAndTheNameStaysFree) {
  TinyHouse house;
  Engine engine(house.config(), test::silent);
  const auto error = [&](const std::string& name, const std::filesystem::path& path) {
    return message_of<InvalidArgument>([&] { engine.add_variant(name, path.string()); });
  };
  const auto good = house.write_variant("good", 2);
  EXPECT_NE(error("../good", good), "");
  EXPECT_NE(error("good", house.base().parent_path() / "nothing"), "");
  EXPECT_NE(error("good", good / "delta.safetensors" / "deeper"), "");
  EXPECT_NE(error("good", std::string("/tmp\0/x", 7)).find("NUL"), std::string::npos);

  // Made from another base: the same shapes, other weights.
  TinyHouse other("{}", 99);
  EXPECT_NE(error("good", other.write_variant("v", 2)).find("base"), std::string::npos);

  // A whole matrix replaced: valid as a file, not servable.
  TinyDelta delta = house.delta(2);
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  delta.replaced[name] = house.model.tensors.at(name).values;
  delta.matrices.erase(name);
  ThreadPool pool(1);
  test::write_delta(delta, house.model, Checkpoint::open(house.base()).weights_digest(pool),
                    good.parent_path() / "whole");
  EXPECT_NE(error("good", good.parent_path() / "whole").find(name), std::string::npos);

  EngineConfig config = house.config();
  config.delta_budget_bytes = 1000;
  Engine small(config, test::silent);
  EXPECT_NE(message_of<InvalidArgument>([&] {
              small.add_variant("good", good.string());
            }).find("the delta slots have 1000"),
            std::string::npos);

  EXPECT_EQ(engine.variants().size(), 1u);
  EXPECT_NO_THROW(engine.add_variant("good", good.string()));
  EXPECT_NE(error("good", good).find("already there"), std::string::npos);
  EXPECT_NE(error("base", good).find("base's name"), std::string::npos);
  EXPECT_EQ(test::ask_one(engine, make_request(1, "good", {1, 2}, 3)).tokens.size(), 3u);
}

TEST(BadInput, TheLimitOfPromptRowsIsCheckedAndNeedsAnEngineThatRuns) {
  TinyHouse house;
  Engine engine(house.config(), test::silent);
  EXPECT_THROW(engine.set_prefill_chunk_tokens(-1), InvalidArgument);
  EXPECT_THROW(engine.set_prefill_chunk_tokens((1 << 17) + 1), InvalidArgument);
  engine.set_prefill_chunk_tokens(1);
  EXPECT_EQ(test::ask_one(engine, make_request(1, "", {1, 2, 3}, 4)).tokens.size(), 4u);
  engine.shutdown();
  EXPECT_THROW(engine.set_prefill_chunk_tokens(0), InternalError);
}

}  // namespace
}  // namespace deltazip
