#include <gtest/gtest.h>

#include <algorithm>

#include "schedule/simulated_engine.h"

namespace deltazip {
namespace {

struct Load {
  const char* name;
  SchedulerConfig config;
  std::int32_t num_variants = 40, num_hot = 4;
  std::int32_t hot_priority = 0;
  std::int32_t max_prompt = 30, num_new = 60;
  std::int32_t load_steps = 3;
  std::int64_t max_delta_bytes = 10;  // of a budget of 40
  bool base_is_hot = true;
};

void PrintTo(const Load& load, std::ostream* out) { *out << load.name; }

SchedulerConfig serving() {
  SchedulerConfig config;
  config.num_blocks = 400;
  config.block_size = 4;
  config.max_batch_tokens = 64;
  config.max_batch_sequences = 16;
  config.max_variants_per_batch = 4;
  config.max_waiting = 1000;
  config.max_model_len = 100;
  config.num_delta_slots = 4;
  config.delta_budget_bytes = 40;
  config.max_variant_wait_steps = 16;
  return config;
}

// docs/scheduling.md: the longest a variant with work can go without a new token. `num_turns` is
// how many turns surely run at once.
std::int64_t bound(const Load& load, std::int32_t num_turns) {
  const SchedulerConfig& config = load.config;
  const std::int32_t max_running = std::min(config.max_batch_sequences, config.max_batch_tokens);
  std::int32_t prefill_rows = config.max_batch_tokens - max_running + 1;
  if (config.prefill_chunk_tokens > 0) {
    prefill_rows = std::min(prefill_rows, (config.prefill_chunk_tokens + 1) / 2);
  }
  const std::int32_t prefill_steps = (config.max_model_len + prefill_rows - 1) / prefill_rows;
  const std::int32_t num_rounds = (load.num_variants + 1 + num_turns - 1) / num_turns;
  return config.max_variant_wait_steps +
         std::int64_t{num_rounds} *
             (2 * config.max_variant_wait_steps + load.load_steps + num_turns * prefill_steps);
}

class Fairness : public testing::TestWithParam<Load> {};

TEST_P(Fairness, NoVariantStarvesUnderEndlessHotArrivals) {
  const Load& load = GetParam();
  SimulatedEngine engine(load.config, 7);
  engine.load_steps = load.load_steps;
  engine.check_always = false;  // the random walks check; here the steps are many
  std::mt19937 rng(7);
  for (VariantId v = 1; v <= load.num_variants; ++v) {
    engine.add_variant(v, 1 + static_cast<std::int64_t>(rng()) % load.max_delta_bytes);
  }
  SequenceId next_id = 1;
  std::map<VariantId, std::vector<SequenceId>> alive;
  std::map<VariantId, std::int32_t> num_finished;
  const auto keep_busy = [&](VariantId variant, std::size_t num_wanted, std::int32_t priority) {
    auto& ids = alive[variant];
    const auto num_gone =
        std::erase_if(ids, [&](SequenceId id) { return !engine.scheduler().has(id); });
    num_finished[variant] += static_cast<std::int32_t>(num_gone);
    while (ids.size() < num_wanted) {
      SimulatedEngine::Request request;
      request.id = next_id++;
      request.variant = variant;
      request.prompt.assign(1 + rng() % static_cast<std::uint32_t>(load.max_prompt),
                            static_cast<std::int32_t>(rng() % 3));
      request.num_new = load.num_new;
      request.priority = priority;
      request.seed = rng();
      engine.submit(request);
      ids.push_back(request.id);
    }
  };
  for (int i = 0; i < 6000; ++i) {
    if (load.base_is_hot) keep_busy(kBaseVariant, 6, load.hot_priority);
    for (VariantId v = 1; v <= load.num_variants; ++v) {
      const bool is_hot = v <= load.num_hot;
      keep_busy(v, is_hot ? 12 : 1, is_hot ? load.hot_priority : 0);
    }
    engine.step();
    if (i % 500 == 0) engine.scheduler().check();
  }
  for (const auto& [variant, count] : num_finished) EXPECT_GT(count, 0) << "variant " << variant;
  EXPECT_LE(engine.longest_wait(), bound(load, load.config.max_variants_per_batch))
      << "variant " << engine.longest_waiter();
  EXPECT_GT(engine.longest_wait(), load.config.max_variant_wait_steps);
  RecordProperty("longest_wait", static_cast<int>(engine.longest_wait()));
  for (const SequenceId id : engine.alive()) engine.cancel(id);
  engine.run_until_idle(100);
  const SchedulerStats stats = engine.scheduler().stats();
  EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
}

Load skewed() { return {.name = "SkewedLoad", .config = serving()}; }

Load hot_have_priority() {
  Load load{.name = "HotOnesHavePriority", .config = serving()};
  load.hot_priority = -1;
  return load;
}

Load few_blocks() {
  Load load{.name = "FewBlocks", .config = serving()};
  load.config.num_blocks = 90;  // less than four of the longest
  load.hot_priority = -1;
  return load;
}

Load slow_loads() {
  Load load{.name = "SlowLoadsOfUnequalSize", .config = serving()};
  load.load_steps = 30;
  load.max_delta_bytes = 40;  // one may need the whole budget: turns come one by one
  load.config.max_variants_per_batch = 1;
  load.config.num_delta_slots = 4;
  return load;
}

Load one_slot() {
  Load load{.name = "OneSlot", .config = serving(), .num_variants = 10, .num_hot = 1};
  load.config.num_delta_slots = load.config.max_variants_per_batch = 1;
  return load;
}

Load two_seats() {
  Load load{.name = "FewerSeatsThanSlots", .config = serving()};
  load.config.num_delta_slots = 8;
  load.config.delta_budget_bytes = 80;
  load.config.max_variants_per_batch = 2;
  return load;
}

Load few_places() {
  Load load{.name = "FewPlaces", .config = serving(), .num_variants = 20};
  load.config.max_batch_sequences = 4;
  load.config.max_batch_tokens = 16;
  return load;
}

Load limited_prefills(const char* name, std::int32_t num_tokens) {
  Load load{.name = name, .config = serving()};
  load.config.prefill_chunk_tokens = num_tokens;
  load.hot_priority = -1;
  load.num_new = 20;  // more prompts beside decodes
  return load;
}

INSTANTIATE_TEST_SUITE_P(Loads, Fairness,
                         testing::Values(skewed(), hot_have_priority(), few_blocks(), slow_loads(),
                                         one_slot(), two_seats(), few_places(),
                                         limited_prefills("FewPrefillRows", 4),
                                         limited_prefills("SharedPrefillRows", 40)),
                         [](const auto& setting) { return setting.param.name; });

}  // namespace
}  // namespace deltazip
