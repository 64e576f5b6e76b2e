// How many rows of prompts a step has.

#include <gtest/gtest.h>

#include "deltazip/base/error.h"
#include "schedule/scheduler_helpers.h"

namespace deltazip {
namespace {

TEST(Prefill, PrefillIsChunkedAndDecodesGoFirst) {
  Scheduler scheduler(small());
  scheduler.add(spec_of(1, 4, 9));
  commit(scheduler, scheduler.plan());
  scheduler.add(spec_of(2, 40, 3));
  Plan plan = scheduler.plan();
  ASSERT_EQ(plan.chunks.size(), 2u);
  EXPECT_EQ(chunk_of(plan, 1)->num_tokens, 1);
  EXPECT_EQ(chunk_of(plan, 1)->start, 4);
  EXPECT_TRUE(chunk_of(plan, 1)->samples);
  // Sequence 1 published its first block, which 2 begins with.
  EXPECT_EQ(chunk_of(plan, 2)->start, 4);
  EXPECT_EQ(chunk_of(plan, 2)->num_tokens, 15);
  EXPECT_FALSE(chunk_of(plan, 2)->samples);
  commit(scheduler, plan);
  plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 2)->start, 19);
  EXPECT_EQ(plan.num_tokens, 16);
  commit(scheduler, plan);
  plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 2)->num_tokens, 6);
  EXPECT_TRUE(chunk_of(plan, 2)->samples);
  commit(scheduler, plan, {1, 2});
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_EQ(scheduler.stats().num_free_blocks, 32);
}

TEST(Prefill, BesideDecodesPrefillsHaveTheRowsOfTheLimit) {
  SchedulerConfig config = small();
  config.prefill_chunk_tokens = 6;
  Scheduler scheduler(config);
  SequenceSpec alone = spec_of(1, 20, 9);
  alone.use_prefix_cache = false;
  scheduler.add(alone);
  Plan plan = scheduler.plan();
  EXPECT_EQ(plan.num_tokens, 16) << "nothing decodes, so nothing waits for the step";
  commit(scheduler, plan);
  commit(scheduler, scheduler.plan());
  SequenceSpec prompt = spec_of(2, 14, 2);
  prompt.use_prefix_cache = false;
  scheduler.add(prompt);
  for (const std::int32_t num_tokens : {6, 6, 2}) {
    plan = scheduler.plan();
    EXPECT_EQ(chunk_of(plan, 1)->num_tokens, 1);
    EXPECT_EQ(chunk_of(plan, 2)->num_tokens, num_tokens);
    EXPECT_EQ(chunk_of(plan, 2)->samples, num_tokens == 2);
    commit(scheduler, plan);
  }
  commit(scheduler, scheduler.plan(), {1, 2});
}

TEST(Prefill, AShortPromptFindsRowsBesideALongOne) {
  SchedulerConfig config = small();
  config.num_blocks = 200;
  config.max_model_len = 400;
  config.max_batch_tokens = 200;
  config.prefill_chunk_tokens = 50;
  Scheduler scheduler(config);
  scheduler.add(spec_of(1, 1, 9));
  commit(scheduler, scheduler.plan());
  const auto add = [&](SequenceId id, std::int32_t num_tokens) {
    SequenceSpec spec = spec_of(id, num_tokens, 2);
    spec.use_prefix_cache = false;
    scheduler.add(spec);
  };
  add(2, 300);
  Plan plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 2)->num_tokens, 50) << "all, while no other wants any";
  commit(scheduler, plan);
  add(3, 12);
  plan = scheduler.plan();
  EXPECT_TRUE(chunk_of(plan, 3)->samples);
  EXPECT_EQ(chunk_of(plan, 2)->num_tokens, 38);
  EXPECT_EQ(plan.num_tokens, 51);
  commit(scheduler, plan, {3});
  for (SequenceId id = 4; id < 7; ++id) add(id, 40);
  plan = scheduler.plan();  // shares: half, then no fewer than are worth a read of a delta
  EXPECT_EQ(chunk_of(plan, 2)->num_tokens, 25);
  EXPECT_EQ(chunk_of(plan, 4)->num_tokens, 16);
  EXPECT_EQ(chunk_of(plan, 5)->num_tokens, 9);
  EXPECT_EQ(chunk_of(plan, 6), nullptr);
  EXPECT_EQ(scheduler.stats().num_waiting, 1) << "without rows nothing is admitted";
  commit(scheduler, plan);
}

TEST(Prefill, AScoredPromptComesInChunksThatTheLogitsHaveRoomFor) {
  SchedulerConfig config = small();
  config.max_batch_logit_rows = 8;
  Scheduler scheduler(config);
  scheduler.add(spec_of(1, 3, 4));
  SequenceSpec scored = spec_of(2, 14, 1);
  scored.use_prefix_cache = false;
  scored.scores_prompt = true;
  scheduler.add(scored);
  Plan plan = scheduler.plan();  // 1 samples one row, 7 are left for 2
  EXPECT_EQ(chunk_of(plan, 1)->num_tokens, 3);
  EXPECT_EQ(chunk_of(plan, 2)->num_tokens, 7);
  EXPECT_EQ(plan.num_logit_rows, 8);
  scheduler.add(spec_of(3, 2, 1));
  commit(scheduler, plan);
  plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 2)->num_tokens, 7);
  EXPECT_EQ(chunk_of(plan, 3), nullptr) << "no logit row was left";
  commit(scheduler, plan, {2});
  plan = scheduler.plan();
  EXPECT_NE(chunk_of(plan, 3), nullptr);
  commit(scheduler, plan, {1, 3});

  config.max_batch_logit_rows = 7;
  EXPECT_NE(message_of<InvalidArgument>([&] { Scheduler few(config); }).find("at least 8"),
            std::string::npos);
}

}  // namespace
}  // namespace deltazip
