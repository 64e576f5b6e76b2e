#include <gtest/gtest.h>

#include <algorithm>

#include "deltazip/base/error.h"
#include "schedule/simulated_engine.h"

namespace deltazip {
namespace {

struct Setting {
  const char* name;
  SchedulerConfig config;
  std::int32_t num_variants = 6;
  std::int32_t max_prompt = 20, max_new = 12;
  double load_failure_chance = 0.1;
};

void PrintTo(const Setting& setting, std::ostream* out) { *out << setting.name; }

SchedulerConfig config_of(std::int32_t num_blocks, std::int32_t block_size, std::int32_t tokens,
                          std::int32_t sequences, std::int32_t slots, std::int32_t variants) {
  SchedulerConfig config;
  config.num_blocks = num_blocks;
  config.block_size = block_size;
  config.max_batch_tokens = tokens;
  config.max_batch_sequences = sequences;
  config.max_variants_per_batch = variants;
  config.max_waiting = 24;
  config.max_model_len = 64;
  config.num_delta_slots = slots;
  config.delta_budget_bytes = 100;
  config.max_variant_wait_steps = 6;
  return config;
}

class SchedulerWalk : public testing::TestWithParam<Setting> {};

// Everything that can be asked of the scheduler, in any order, also while a plan is under way.
TEST_P(SchedulerWalk, EveryTokenIsComputedOnceInItsRightContext) {
  const Setting& setting = GetParam();
  std::int64_t num_operations = 0;
  std::int64_t num_preemptions = 0, num_hits = 0, num_copies = 0, num_failed = 0;
  for (std::uint32_t seed = 1; seed <= 8; ++seed) {
    std::mt19937 rng(seed);
    const auto draw = [&](std::int32_t n) {
      return static_cast<std::int32_t>(rng() % static_cast<std::uint32_t>(n));
    };
    SimulatedEngine engine(setting.config, seed);
    engine.load_failure_chance = setting.load_failure_chance;
    engine.plans_ahead = seed % 2 == 0;
    SequenceId next_id = 1;
    VariantId next_variant = 1;
    std::vector<VariantId> leaving;
    const auto add_variant = [&] { engine.add_variant(next_variant++, 10 + draw(50)); };
    for (std::int32_t i = 0; i < setting.num_variants; ++i) add_variant();

    const auto operate = [&] {
      ++num_operations;
      const std::vector<SequenceId> alive = engine.alive();
      const auto any = [&] {
        return alive[static_cast<std::size_t>(draw(static_cast<int>(alive.size())))];
      };
      const int action = draw(20);
      if (action < 12) {
        SimulatedEngine::Request request;
        request.id = next_id++;
        const auto variants = engine.variants();
        request.variant =
            variants[static_cast<std::size_t>(draw(static_cast<int>(variants.size())))];
        // Prompts share long beginnings: all zeros but for the end.
        request.prompt.assign(static_cast<std::size_t>(1 + draw(setting.max_prompt)), 0);
        if (draw(2) == 0) request.prompt.back() = draw(3);
        request.num_new = 1 + draw(setting.max_new);
        request.max_new = request.num_new + draw(3);
        request.priority = draw(4) == 0 ? draw(3) - 1 : 0;
        request.salt = draw(4) == 0 ? 1 : 0;
        request.seed = static_cast<std::uint64_t>(draw(4));
        request.use_prefix_cache = draw(8) != 0;
        request.scores_prompt = !request.use_prefix_cache;
        request.fails_after = draw(12) == 0 ? draw(6) : -1;
        const std::int32_t num_waiting = engine.scheduler().stats().num_waiting;
        try {
          engine.submit(request);
          ASSERT_LT(num_waiting, setting.config.max_waiting);
        } catch (const ResourceExhausted&) {
          ASSERT_GE(num_waiting, setting.config.max_waiting);
        } catch (const NotFound&) {
          ASSERT_TRUE(std::count(leaving.begin(), leaving.end(), request.variant));
        }
      } else if (action < 14 && !alive.empty()) {
        engine.cancel(any());
      } else if (action < 18 && !alive.empty()) {
        const SequenceId parent = any();
        if (engine.can_fork(parent) && alive.size() < 40) {
          engine.fork(parent, next_id++, static_cast<std::uint64_t>(draw(4)));
        } else if (!engine.can_fork(parent)) {
          ASSERT_THROW(engine.scheduler().fork(parent, next_id), InvalidArgument);
        }
      } else if (action == 18 && draw(4) == 0) {
        add_variant();
        leaving.push_back(1 + draw(next_variant - 1));
      } else if (action == 19 && setting.config.prefill_chunk_tokens > 0) {
        engine.set_prefill_chunk_tokens(draw(2 * setting.config.prefill_chunk_tokens));
      }
      std::erase_if(leaving, [&](VariantId v) { return engine.try_remove_variant(v); });
    };
    try {
      for (int i = 0; i < 1200; ++i) {
        engine.begin_step();
        for (int j = draw(3); j > 0; --j) operate();
        engine.finish_step();
        if (draw(200) == 0) engine.run_until_idle(5000);
        for (int j = draw(3); j > 0; --j) operate();
        engine.load_steps = 1 + draw(4);
      }
      engine.run_until_idle(5000);
    } catch (const std::exception& error) {
      FAIL() << "seed " << seed << ", step " << engine.num_steps() << ": " << error.what();
    }
    EXPECT_EQ(engine.num_steps_ahead() > engine.num_steps() / 4, engine.plans_ahead);
    const SchedulerStats stats = engine.scheduler().stats();
    EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
    EXPECT_EQ(stats.num_waiting + stats.num_running, 0);
    EXPECT_FALSE(engine.scheduler().has_work());
    for (const VariantId variant : engine.variants()) {
      if (variant != kBaseVariant) {
        EXPECT_TRUE(engine.try_remove_variant(variant)) << variant;
      }
    }
    num_preemptions += stats.num_preemptions;
    num_hits += stats.prefix_hit_tokens;
    num_copies += engine.num_copies();
    num_failed += engine.num_failed_by_load();
  }
  EXPECT_GT(num_operations, 5000);
  EXPECT_GT(num_preemptions, 0);
  EXPECT_EQ(num_hits > 0, setting.config.prefix_caching);
  EXPECT_EQ(num_copies > 0, setting.config.block_size > 1);
  EXPECT_GT(num_failed, 0);
}

Setting without_prefix_cache() {
  Setting setting{"WithoutPrefixCache", config_of(14, 4, 12, 6, 2, 2)};
  setting.config.prefix_caching = false;
  return setting;
}

Setting few_logit_rows() {
  Setting setting{"FewLogitRows", config_of(40, 4, 32, 6, 3, 3), 6, 40, 12};
  setting.config.max_batch_logit_rows = 6;
  return setting;
}

Setting limited_prefills(const char* name, std::int32_t num_tokens) {
  Setting setting{name, config_of(60, 4, 64, 8, 4, 4), 6, 40, 20};
  setting.config.prefill_chunk_tokens = num_tokens;
  return setting;
}

INSTANTIATE_TEST_SUITE_P(
    Settings, SchedulerWalk,
    testing::Values(Setting{"Roomy", config_of(200, 4, 64, 16, 4, 4), 6, 40, 20},
                    Setting{"TinyCache", config_of(9, 4, 16, 8, 3, 3)},
                    Setting{"OneSlot", config_of(24, 4, 16, 8, 1, 1)},
                    Setting{"MoreSlotsThanSeats", config_of(24, 4, 16, 8, 6, 2), 12},
                    Setting{"MoreSeatsThanSlots", config_of(24, 4, 16, 8, 2, 6), 12},
                    Setting{"OneTokenBlocks", config_of(40, 1, 8, 8, 3, 3), 6, 16, 10},
                    Setting{"OneRow", config_of(12, 4, 1, 8, 3, 3), 4, 12, 6},
                    Setting{"FewPlaces", config_of(30, 4, 64, 2, 3, 3), 8}, without_prefix_cache(),
                    few_logit_rows(), limited_prefills("FewPrefillRows", 3),
                    limited_prefills("SharedPrefillRows", 40)),
    [](const auto& setting) { return setting.param.name; });

}  // namespace
}  // namespace deltazip
