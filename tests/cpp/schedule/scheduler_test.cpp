#include "deltazip/schedule/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <string>

#include "deltazip/base/error.h"
#include "deltazip/schedule/block_allocator.h"
#include "schedule/scheduler_helpers.h"

namespace deltazip {
namespace {

TEST(Plan, ReadsTheSlotsOfItsChunks) {
  Scheduler scheduler(small());
  scheduler.add_variant(1, 10);
  scheduler.add(spec_of(1, 3, 4, 1));
  scheduler.add(spec_of(2, 3, 4));
  Plan plan = scheduler.plan();  // the base's chunk, and a load
  ASSERT_EQ(plan.loads.size(), 1u);
  const SlotId slot = plan.loads.front().slot;
  EXPECT_FALSE(plan.reads(slot)) << "its step may run while the load writes";
  commit(scheduler, plan);
  scheduler.delta_loaded(slot);
  plan = scheduler.plan();
  EXPECT_TRUE(plan.reads(slot));
  EXPECT_FALSE(plan.reads(slot + 1));
  commit(scheduler, plan, {1, 2});
}

TEST(Scheduler, WhatCannotEverFitIsRefusedWithNumbers) {
  SchedulerConfig config = small();
  config.max_model_len = 1000;
  Scheduler scheduler(config);
  scheduler.add(spec_of(1, 100, 29));  // 128 computed tokens: exactly all blocks
  const std::string too_many =
      message_of<InvalidArgument>([&] { scheduler.add(spec_of(2, 100, 30)); });
  EXPECT_EQ(
      too_many,
      "sequence 2: 100 prompt tokens and up to 30 new ones need 33 blocks of 4 tokens, the KV "
      "cache has 32");
  EXPECT_EQ(message_of<InvalidArgument>([&] { scheduler.add(spec_of(3, 999, 2)); }),
            "sequence 3: 999 prompt tokens and up to 2 new ones are 1001, the limit is 1000");
  EXPECT_THROW(scheduler.add(spec_of(4, 0, 2)), InvalidArgument);
  EXPECT_THROW(scheduler.add(spec_of(5, 1, -1)), InvalidArgument);
  EXPECT_THROW(scheduler.add(spec_of(1, 1, 1)), InvalidArgument);
  EXPECT_THROW(scheduler.add(spec_of(6, 1, 1, 77)), NotFound);
  EXPECT_THROW(scheduler.tokens(6), NotFound);
  EXPECT_EQ(message_of<InvalidArgument>([&] { scheduler.add_variant(1, 101); }),
            "variant 1: its delta takes 101 bytes, the budget of all slots is 100");
  for (SequenceId id = 10; id < 17; ++id) scheduler.add(spec_of(id, 1, 1));
  EXPECT_EQ(message_of<ResourceExhausted>([&] { scheduler.add(spec_of(17, 1, 1)); }),
            "the queue is full: 8 sequences wait, the limit is 8");
  scheduler.check();
}

TEST(Scheduler, ConfigurationIsChecked) {
  SchedulerConfig config = small();
  config.max_variant_wait_steps = 0;
  EXPECT_EQ(message_of<InvalidArgument>([&] { Scheduler scheduler(config); }),
            "scheduler: max_variant_wait_steps must be at least 1, got 0");
  config = small();
  config.prefill_chunk_tokens = -1;
  EXPECT_EQ(message_of<InvalidArgument>([&] { Scheduler scheduler(config); }),
            "scheduler: prefill_chunk_tokens must be at least 1, or 0 for no limit, got -1");
}

TEST(Scheduler, ThePrefixCacheIsFoundAgainButTheLastTokenIsComputed) {
  Scheduler scheduler(small());
  scheduler.add(spec_of(1, 8, 5));
  commit(scheduler, scheduler.plan(), {1});
  scheduler.add(spec_of(2, 8, 5));  // both blocks are published
  scheduler.add(spec_of(3, 9, 5));  // both can be used
  scheduler.add(spec_of(4, 8, 5, kBaseVariant, 1));
  SequenceSpec other = spec_of(5, 8, 5);
  other.prefix_root = prefix_root(other.prefix_root, {});
  scheduler.add(other);  // another salt
  const Plan plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 2)->start, 4);
  EXPECT_EQ(chunk_of(plan, 3)->start, 8);
  EXPECT_EQ(chunk_of(plan, 5)->start, 0);
  EXPECT_EQ(chunk_of(plan, 2)->blocks[0], chunk_of(plan, 3)->blocks[0]);
  EXPECT_NE(chunk_of(plan, 2)->blocks[1], chunk_of(plan, 3)->blocks[1]);
  EXPECT_NE(chunk_of(plan, 2)->blocks[0], chunk_of(plan, 5)->blocks[0]);
  commit(scheduler, plan, {2, 3, 5});
}

TEST(Scheduler, GeneratedBlocksArePublishedToo) {
  Scheduler scheduler(small());
  scheduler.add(spec_of(1, 3, 9));
  for (int i = 0; i < 8; ++i) commit(scheduler, scheduler.plan(), {}, 7);
  SequenceSpec next = spec_of(2, 3, 3);  // the next turn of that conversation
  for (int i = 0; i < 8; ++i) next.prompt.push_back(7);
  scheduler.add(next);
  const Plan plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 2)->start, 8);
  commit(scheduler, plan, {1, 2});
}

TEST(Scheduler, WithoutPrefixCacheNothingIsLookedUpOrPublished) {
  Scheduler scheduler(small());
  SequenceSpec spec = spec_of(1, 12, 1);
  spec.use_prefix_cache = false;
  scheduler.add(spec);
  commit(scheduler, scheduler.plan(), {1});
  scheduler.add(spec_of(2, 12, 1));  // would find what 1 published
  Plan plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 2)->start, 0);
  commit(scheduler, plan, {2});
  spec.id = 3;  // would find what 2 published
  scheduler.add(spec);
  plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 3)->start, 0);
  commit(scheduler, plan, {3});
  EXPECT_EQ(scheduler.stats().prefix_hit_tokens, 0);
  EXPECT_EQ(scheduler.stats().prefix_query_tokens, 12);
}

TEST(Scheduler, BlocksOfAnErrorAreNotFoundByOthers) {
  Scheduler scheduler(small());
  scheduler.add(spec_of(1, 12, 4));
  const Plan failing = scheduler.plan();
  scheduler.commit(failing, std::array{Scheduler::Outcome{1, -1, true}});
  scheduler.add(spec_of(2, 12, 4));
  const Plan plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 2)->start, 0);
  commit(scheduler, plan, {2});
}

TEST(Scheduler, ForkSharesBlocksAndCopiesTheLastOnWrite) {
  Scheduler scheduler(small());
  scheduler.add(spec_of(1, 6, 9));
  EXPECT_THROW(scheduler.fork(1, 2), InvalidArgument);  // its prompt is not computed
  const Plan first = scheduler.plan();
  scheduler.fork(1, 2);
  scheduler.fork(1, 3);
  EXPECT_THROW(scheduler.fork(1, 3), InvalidArgument);
  EXPECT_THROW(scheduler.fork(9, 4), NotFound);
  EXPECT_THROW(scheduler.commit(first, std::array{Scheduler::Outcome{1, 7, false}}), InternalError);
  scheduler.commit(first,
                   std::array{Scheduler::Outcome{1, 7, false}, Scheduler::Outcome{2, 8, false},
                              Scheduler::Outcome{3, 9, false}});
  scheduler.check();
  EXPECT_EQ(scheduler.tokens(2).back(), 8);
  EXPECT_EQ(scheduler.tokens(3).size(), 7u);
  EXPECT_EQ(scheduler.stats().num_free_blocks, 30);
  const Plan plan = scheduler.plan();
  ASSERT_EQ(plan.chunks.size(), 3u);
  EXPECT_EQ(plan.copies.size(), 2u);  // the last of the three writes in place
  for (const BlockCopy& copy : plan.copies) EXPECT_NE(copy.from, copy.to);
  EXPECT_EQ(chunk_of(plan, 1)->blocks[0], chunk_of(plan, 3)->blocks[0]);
  EXPECT_NE(chunk_of(plan, 1)->blocks[1], chunk_of(plan, 2)->blocks[1]);
  EXPECT_NE(chunk_of(plan, 2)->blocks[1], chunk_of(plan, 3)->blocks[1]);
  commit(scheduler, plan, {1});
  EXPECT_EQ(scheduler.stats().num_free_blocks, 29);  // of 1 only the copied block came back
  scheduler.cancel(2);
  scheduler.cancel(3);
  EXPECT_EQ(scheduler.stats().num_free_blocks, 32);
  scheduler.check();
}

TEST(Scheduler, TheLowestRankedIsPreemptedAndComesBack) {
  SchedulerConfig config = small();
  config.num_blocks = 8;
  config.prefix_caching = false;
  Scheduler scheduler(config);
  scheduler.add(spec_of(1, 11, 20));
  scheduler.add(spec_of(2, 11, 8, kBaseVariant, -1));  // later, but of higher priority
  std::vector<SequenceId> preempted;
  std::int32_t restart = -1;
  for (int i = 0; i < 30 && scheduler.has_work(); ++i) {
    const Plan plan = scheduler.plan();
    preempted.insert(preempted.end(), plan.preempted.begin(), plan.preempted.end());
    const ScheduledChunk* chunk = chunk_of(plan, 1);
    if (!preempted.empty() && restart < 0 && chunk != nullptr) {
      EXPECT_EQ(chunk->start, 0);
      restart = chunk->num_tokens;
    }
    std::vector<SequenceId> finished;
    for (const SequenceId id : {1, 2}) {
      if (scheduler.tokens(id).size() == (id == 1 ? 30u : 18u)) finished.push_back(id);
    }
    if (i > 10) finished.push_back(2);
    commit(scheduler, plan, finished);
    if (!scheduler.has(2)) break;
  }
  EXPECT_EQ(preempted, std::vector<SequenceId>{1});
  scheduler.cancel(1);
  EXPECT_EQ(scheduler.stats().num_free_blocks, 8);
}

TEST(Scheduler, HigherPriorityTakesThePlaceOfLower) {
  SchedulerConfig config = small();
  config.max_batch_sequences = 2;
  Scheduler scheduler(config);
  scheduler.add(spec_of(1, 4, 30));
  scheduler.add(spec_of(2, 4, 30));
  commit(scheduler, scheduler.plan());
  scheduler.add(spec_of(3, 4, 30));
  scheduler.add(spec_of(4, 4, 30, kBaseVariant, -5));
  const Plan plan = scheduler.plan();
  EXPECT_EQ(plan.preempted, std::vector<SequenceId>{2});
  EXPECT_TRUE(chunk_of(plan, 1) != nullptr && chunk_of(plan, 4) != nullptr);
  commit(scheduler, plan, {4});
  const Plan next = scheduler.plan();
  EXPECT_NE(chunk_of(next, 2), nullptr);  // it is older than 3
  commit(scheduler, next);
}

TEST(Scheduler, LoadsAreAsynchronousAndChunksSortedBySlot) {
  Scheduler scheduler(small());
  scheduler.add_variant(1, 60);
  scheduler.add_variant(2, 40);
  scheduler.add(spec_of(1, 4, 9, 2));
  scheduler.add(spec_of(2, 4, 9, 1));
  scheduler.add(spec_of(3, 4, 9));
  Plan plan = scheduler.plan();
  ASSERT_EQ(plan.loads.size(), 2u);
  EXPECT_EQ(plan.chunks.size(), 1u);  // the base does not wait
  EXPECT_EQ(scheduler.slot_of(2), plan.loads[0].slot);
  const SlotId slot = plan.loads[0].slot, other = plan.loads[1].slot;
  commit(scheduler, plan);
  scheduler.delta_loaded(slot);
  plan = scheduler.plan();
  EXPECT_EQ(chunk_of(plan, 1)->slot, slot);
  EXPECT_EQ(chunk_of(plan, 2), nullptr);
  commit(scheduler, plan);
  scheduler.delta_loaded(other);
  plan = scheduler.plan();
  ASSERT_EQ(plan.chunks.size(), 3u);
  EXPECT_EQ(plan.chunks[0].slot, kNoSlot);
  EXPECT_LT(plan.chunks[1].slot, plan.chunks[2].slot);
  EXPECT_TRUE(plan.loads.empty());
  commit(scheduler, plan, {1, 2, 3});
  // Idle deltas stay until their place is needed; the least recently used goes.
  scheduler.add_variant(3, 30);
  scheduler.add(spec_of(4, 4, 1, 1));
  commit(scheduler, scheduler.plan(), {4});
  scheduler.add(spec_of(5, 4, 1, 3));
  plan = scheduler.plan();
  ASSERT_EQ(plan.loads.size(), 1u);
  EXPECT_TRUE(plan.empty());
  EXPECT_EQ(plan.loads[0].evicted, std::vector<SlotId>{slot});
  EXPECT_FALSE(scheduler.slot_of(2).has_value());
  EXPECT_EQ(scheduler.delta_load_failed(plan.loads[0].slot), std::vector<SequenceId>{5});
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_THROW(scheduler.delta_loaded(plan.loads[0].slot), InternalError);
  scheduler.check();
}

TEST(Scheduler, RemovalDrains) {
  Scheduler scheduler(small());
  scheduler.add_variant(1, 60);
  EXPECT_THROW(scheduler.add_variant(1, 60), InvalidArgument);
  EXPECT_THROW(scheduler.try_remove_variant(kBaseVariant), InvalidArgument);
  scheduler.add(spec_of(1, 4, 9, 1));
  Plan plan = scheduler.plan();
  const SlotId slot = plan.loads.at(0).slot;
  scheduler.cancel(1);
  EXPECT_FALSE(scheduler.try_remove_variant(1));  // its load is under way
  EXPECT_THROW(scheduler.add(spec_of(2, 4, 9, 1)), NotFound);
  scheduler.delta_loaded(slot);
  EXPECT_TRUE(scheduler.try_remove_variant(1));
  EXPECT_TRUE(scheduler.try_remove_variant(1));
  EXPECT_FALSE(scheduler.slot_of(1).has_value());

  scheduler.add_variant(2, 100);
  scheduler.add(spec_of(3, 4, 9, 2));
  plan = scheduler.plan();
  scheduler.delta_loaded(plan.loads.at(0).slot);
  plan = scheduler.plan();
  EXPECT_FALSE(scheduler.try_remove_variant(2));
  scheduler.cancel(3);
  EXPECT_EQ(scheduler.stats().num_free_blocks, 32);
  EXPECT_FALSE(scheduler.try_remove_variant(2));  // the step under way reads its delta
  scheduler.commit(plan, {});
  EXPECT_TRUE(scheduler.try_remove_variant(2));
  scheduler.check();
}

TEST(Scheduler, ACancelledIdMayComeAgainWhileItsPlanIsUnderWay) {
  Scheduler scheduler(small());
  scheduler.add(spec_of(1, 4, 9));
  const Plan plan = scheduler.plan();
  const ScheduledChunk& chunk = plan.chunks.at(0);
  scheduler.cancel(1);
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_EQ(chunk.tokens.size(), 4u);  // the spans live until commit
  EXPECT_EQ(chunk.tokens[3], 3);
  EXPECT_EQ(chunk.blocks.size(), 1u);
  scheduler.add(spec_of(1, 7, 9));
  scheduler.commit(plan, std::array{Scheduler::Outcome{1, 5, false}});
  EXPECT_EQ(scheduler.tokens(1).size(), 7u);
  scheduler.check();
}

TEST(Scheduler, AWrongCommitChangesNothing) {
  Scheduler scheduler(small());
  scheduler.add(spec_of(1, 20, 9));
  const Plan plan = scheduler.plan();  // 16 tokens: does not sample
  EXPECT_THROW(scheduler.plan(), InternalError);
  EXPECT_THROW(scheduler.commit(Plan{}, {}), InternalError);
  EXPECT_THROW(scheduler.commit(plan, std::array{Scheduler::Outcome{1, 5, false}}), InternalError);
  scheduler.commit(plan, {});
  const Plan last = scheduler.plan();
  EXPECT_THROW(scheduler.commit(last, {}), InternalError);
  scheduler.check();
  scheduler.commit(last, std::array{Scheduler::Outcome{1, 5, false}});
  EXPECT_EQ(scheduler.tokens(1).size(), 21u);
}

// Medians of many steps, side by side in one run: only the ratio is judged.
double seconds_per_step(std::int32_t num_registered) {
  SchedulerConfig config = small();
  config.num_blocks = 64 * 40;
  config.block_size = 16;
  config.max_batch_tokens = 512;
  config.max_batch_sequences = 64;
  config.max_model_len = 600;
  config.num_delta_slots = config.max_variants_per_batch = 8;
  config.delta_budget_bytes = 800;
  config.max_waiting = 100;
  Scheduler scheduler(config);
  for (VariantId v = 1; v <= num_registered; ++v) scheduler.add_variant(v, 100);
  for (SequenceId id = 0; id < 64; ++id) {
    scheduler.add(spec_of(id, 20, 500, 1 + static_cast<VariantId>(id % 8)));
  }
  for (const DeltaLoad& load : scheduler.plan().loads) scheduler.delta_loaded(load.slot);
  std::vector<double> seconds;
  std::vector<Scheduler::Outcome> outcomes;
  for (int i = 0; i < 400; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const Plan plan = scheduler.plan();
    outcomes.clear();
    for (const ScheduledChunk& chunk : plan.chunks) {
      if (chunk.samples) outcomes.push_back({chunk.id, static_cast<std::int32_t>(i), false});
    }
    scheduler.commit(plan, outcomes);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    seconds.push_back(elapsed.count());
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

TEST(Scheduler, AStepCostsTheSameHoweverManyVariantsAreRegistered) {
  const double few = seconds_per_step(8);
  const double many = seconds_per_step(50000);
  RecordProperty("microseconds_per_step_of_64", std::to_string(few * 1e6));
  EXPECT_LT(many, 4 * few + 1e-5) << few << " s against " << many << " s";
}

}  // namespace
}  // namespace deltazip
