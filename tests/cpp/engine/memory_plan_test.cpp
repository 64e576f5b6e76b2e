#include "engine/memory_plan.h"

#include <gtest/gtest.h>

#include "engine/harness.h"

namespace deltazip::engine {
namespace {

constexpr std::int64_t kMiB = 1 << 20;

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

std::int64_t sum(const MemoryPlan& plan) {
  std::int64_t bytes = 0;
  for (const CapacityRow& row : plan.rows) bytes += row.bytes;
  return bytes;
}

std::string error_of(const EngineConfig& config, const MemoryNeeds& needs) {
  return test::message_of<InvalidArgument>([&] { plan_memory(config, needs); });
}

TEST(MemoryPlan, SharesAllOfTheBudget) {
  const MemoryPlan plan = plan_memory({}, needs());
  EXPECT_EQ(plan.config.memory_budget_bytes, 8'000 * kMiB);
  EXPECT_EQ(plan.config.delta_budget_bytes, 8 * 50 * kMiB);
  EXPECT_EQ(plan.config.kv_cache_bytes, (8'000 - 1'100 - 400) * kMiB);
  EXPECT_EQ(plan.num_blocks, 6'500);
  EXPECT_EQ(plan.config.max_model_len, 8192);
  EXPECT_EQ(sum(plan), plan.config.memory_budget_bytes);
}

TEST(MemoryPlan, FewSlotsStillHoldOneOfTheLargest) {
  MemoryNeeds large = needs();
  large.largest_delta = 120 * kMiB;
  EngineConfig config;
  config.num_delta_slots = 1;
  EXPECT_EQ(plan_memory(config, large).config.delta_budget_bytes, 120 * kMiB);
}

TEST(MemoryPlan, AHostsMemoryIsNotHoarded) {
  MemoryNeeds shared = needs();
  shared.shares_host_memory = true;
  const MemoryPlan plan = plan_memory({}, shared);
  EXPECT_EQ(plan.config.kv_cache_bytes, kMaxAutomaticHostKvBytes);
  EXPECT_EQ(sum(plan), plan.config.memory_budget_bytes);
  shared.kv_block = 10 * kMiB;  // one longest sequence takes 5,120 MiB
  EXPECT_EQ(plan_memory({}, shared).config.kv_cache_bytes, 5'120 * kMiB);
}

TEST(MemoryPlan, AnAutomaticLengthIsLoweredAndSaidSo) {
  EngineConfig config;
  config.kv_cache_bytes = 100 * kMiB;
  const MemoryPlan plan = plan_memory(config, needs());
  EXPECT_EQ(plan.config.max_model_len, 1'600);
  EXPECT_NE(plan.rows[3].detail.find("lowered from 8192 to 1600"), std::string::npos)
      << plan.rows[3].detail;
}

TEST(MemoryPlan, WhatDoesNotFitIsRefusedWithTheNumbers) {
  EngineConfig config;
  config.memory_budget_bytes = 1'000 * kMiB;
  EXPECT_NE(error_of(config, needs()).find("weights take 1000.0 MiB"), std::string::npos);

  config = {};
  config.kv_cache_bytes = 100 * kMiB;
  config.max_model_len = 4'096;
  EXPECT_NE(error_of(config, needs()).find("holds 1600 tokens"), std::string::npos);

  config = {};
  config.kv_cache_bytes = 9'000 * kMiB;
  EXPECT_NE(error_of(config, needs()).find("only 6500.0 MiB"), std::string::npos);

  config = {};
  config.delta_budget_bytes = 9'000 * kMiB;
  EXPECT_NE(error_of(config, needs()).find("only 6900.0 MiB"), std::string::npos);

  config = {};
  config.kv_cache_bytes = 1;  // less than a block
  EXPECT_NE(error_of(config, needs()).find("holds 0 tokens"), std::string::npos);
}

}  // namespace
}  // namespace deltazip::engine
