#include "engine/memory_plan.h"

#include <gtest/gtest.h>

#include "engine/harness.h"

namespace deltazip::engine {
namespace {

constexpr std::int64_t kMiB = 1 << 20;

// Of a device of its own; on a host with `shares_host_memory`.
MemoryNeeds needs() {
  MemoryNeeds needs;
  needs.free_memory = 10'000 * kMiB;
  needs.weights = 1'000 * kMiB;
  needs.scratch = 100 * kMiB;
  needs.typical_delta = 50 * kMiB;
  needs.kv_block = kMiB;
  needs.model_max_len = 8192;
  return needs;
}

EngineConfig sized() { return resolve_batch_sizes({}, /*shares_host_memory=*/false); }

std::int64_t sum(const MemoryPlan& plan) {
  std::int64_t bytes = 0;
  for (const CapacityRow& row : plan.rows) bytes += row.bytes;
  return bytes;
}

std::string error_of(const EngineConfig& config, const MemoryNeeds& needs) {
  return test::message_of<InvalidArgument>([&] { plan_memory(config, needs); });
}

TEST(MemoryPlan, SharesAllOfTheBudget) {
  EngineConfig config = sized();
  config.num_delta_slots = 8;
  const MemoryPlan plan = plan_memory(config, needs());
  EXPECT_EQ(plan.config.memory_budget_bytes, 9'200 * kMiB);
  EXPECT_EQ(plan.config.delta_budget_bytes, 8 * 50 * kMiB);
  EXPECT_EQ(plan.config.kv_cache_bytes, (9'200 - 1'100 - 400) * kMiB);
  EXPECT_EQ(plan.num_blocks, 7'700);
  EXPECT_EQ(plan.config.max_model_len, 8192);
  EXPECT_EQ(sum(plan), plan.config.memory_budget_bytes);
}

TEST(MemoryPlan, ManySlotsTakeAtMostHalfOfWhatIsLeft) {
  MemoryNeeds large = needs();
  large.typical_delta = 1'000 * kMiB;
  const MemoryPlan plan = plan_memory(sized(), large);
  EXPECT_EQ(plan.config.num_delta_slots, 64);
  EXPECT_EQ(plan.config.delta_budget_bytes, (9'200 - 1'100) / 2 * kMiB);
}

TEST(MemoryPlan, ADeviceTakesLargerBatches) {
  const EngineConfig on_device = resolve_batch_sizes({}, /*shares_host_memory=*/false);
  EXPECT_EQ(on_device.max_batch_tokens, 8192);
  EXPECT_EQ(on_device.max_batch_sequences, 256);
  EXPECT_EQ(on_device.max_variants_per_batch, 64);
  EXPECT_EQ(on_device.num_delta_slots, 64);
  EXPECT_EQ(max_logit_rows(on_device), 1024);
  const EngineConfig on_host = resolve_batch_sizes({}, /*shares_host_memory=*/true);
  EXPECT_EQ(on_host.max_batch_tokens, 512);
  EXPECT_EQ(on_host.max_batch_sequences, 64);
  EXPECT_EQ(on_host.max_variants_per_batch, 8);
  EXPECT_EQ(on_host.num_delta_slots, 8);
  EXPECT_EQ(max_logit_rows(on_host), 512);

  EngineConfig given;
  given.max_batch_tokens = 5'000;
  given.max_batch_sequences = 3'000;
  given = resolve_batch_sizes(given, false);
  EXPECT_EQ(given.max_batch_tokens, 5'000);
  EXPECT_EQ(max_logit_rows(given), 3'000) << "one for each sequence of a step";
}

TEST(MemoryPlan, FewSlotsStillHoldOneOfTheLargest) {
  MemoryNeeds large = needs();
  large.largest_delta = 120 * kMiB;
  EngineConfig config = sized();
  config.num_delta_slots = 1;
  EXPECT_EQ(plan_memory(config, large).config.delta_budget_bytes, 120 * kMiB);
}

TEST(MemoryPlan, AHostsMemoryIsNotHoarded) {
  MemoryNeeds shared = needs();
  shared.shares_host_memory = true;
  const EngineConfig on_host = resolve_batch_sizes({}, /*shares_host_memory=*/true);
  const MemoryPlan plan = plan_memory(on_host, shared);
  EXPECT_EQ(plan.config.memory_budget_bytes, 8'000 * kMiB);
  EXPECT_EQ(plan.config.kv_cache_bytes, kMaxAutomaticHostKvBytes);
  EXPECT_EQ(sum(plan), plan.config.memory_budget_bytes);
  shared.kv_block = 10 * kMiB;  // one longest sequence takes 5,120 MiB
  EXPECT_EQ(plan_memory(on_host, shared).config.kv_cache_bytes, 5'120 * kMiB);
}

TEST(MemoryPlan, AnAutomaticLengthIsLoweredAndSaidSo) {
  EngineConfig config = sized();
  config.kv_cache_bytes = 100 * kMiB;
  const MemoryPlan plan = plan_memory(config, needs());
  EXPECT_EQ(plan.config.max_model_len, 1'600);
  EXPECT_NE(plan.rows[3].detail.find("lowered from 8192 to 1600"), std::string::npos)
      << plan.rows[3].detail;
}

TEST(MemoryPlan, WhatDoesNotFitIsRefusedWithTheNumbers) {
  EngineConfig config = sized();
  config.memory_budget_bytes = 1'000 * kMiB;
  EXPECT_NE(error_of(config, needs()).find("weights take 1000.0 MiB"), std::string::npos);
  EXPECT_NE(error_of(config, needs()).find("a larger device"), std::string::npos);
  config.memory_budget_bytes = 1'050 * kMiB;  // half of scratch is too much, a quarter is not
  EXPECT_NE(error_of(config, needs()).find("max_batch_tokens: 2048 would"), std::string::npos)
      << error_of(config, needs());

  config = sized();
  config.kv_cache_bytes = 100 * kMiB;
  config.max_model_len = 4'096;
  EXPECT_NE(error_of(config, needs()).find("holds 1600 tokens"), std::string::npos);

  config = sized();
  config.kv_cache_bytes = 9'000 * kMiB;
  EXPECT_NE(error_of(config, needs()).find("only 4900.0 MiB"), std::string::npos);

  config = sized();
  config.delta_budget_bytes = 9'000 * kMiB;
  EXPECT_NE(error_of(config, needs()).find("only 8100.0 MiB"), std::string::npos);

  config = sized();
  config.kv_cache_bytes = 1;  // less than a block
  EXPECT_NE(error_of(config, needs()).find("holds 0 tokens"), std::string::npos);
}

}  // namespace
}  // namespace deltazip::engine
