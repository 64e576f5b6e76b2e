#include "backend/cuda/merge_plan.h"

#include <gtest/gtest.h>

#include <random>

#include "backend/cuda/kernels/base_gemm/config.h"

namespace deltazip::cuda {
namespace {

SbmmTask task(std::int32_t first_row, std::int32_t num_rows, std::int64_t out_offset) {
  static const int kData = 0;
  SbmmTask out;
  out.delta.data = &kData;
  out.delta.rows = 64;
  out.first_row = first_row;
  out.num_rows = num_rows;
  out.out_offset = out_offset;
  return out;
}

TEST(MergePlanTest, SplitsRowsBySizeOfSegment) {
  SbmmTask empty = task(700, 100, 0);
  empty.delta.data = nullptr;
  const std::vector<SbmmTask> tasks = {task(200, 500, 64), task(0, 10, 0), task(200, 500, 0),
                                       task(0, 10, 64),    empty,          task(800, 300, 128)};
  const MergePlan plan =
      plan_merges(tasks, 1100, [](const SbmmTask& t) { return t.num_rows >= 300; });
  ASSERT_EQ(plan.merged.size(), 2u);
  EXPECT_EQ(plan.merged[0].first_row, 200);
  EXPECT_EQ(plan.merged[0].num_rows, 500);
  ASSERT_EQ(plan.merged[0].tasks.size(), 2u);
  EXPECT_EQ(plan.merged[0].tasks[0].out_offset, 0);
  EXPECT_EQ(plan.merged[0].tasks[1].out_offset, 64);
  EXPECT_EQ(plan.merged[1].first_row, 800);
  ASSERT_EQ(plan.base.size(), 2u);
  EXPECT_EQ(plan.base[0].first, 0);
  EXPECT_EQ(plan.base[0].count, 200);
  EXPECT_EQ(plan.base[1].first, 700);
  EXPECT_EQ(plan.base[1].count, 100);
  EXPECT_EQ(plan.sparse.size(), 2u);
}

TEST(MergePlanTest, EveryRowIsSomebodysOnce) {
  std::mt19937 rng(5);
  for (int round = 0; round < 500; ++round) {
    std::vector<SbmmTask> tasks;
    std::int32_t row = 0;
    while (row < 2000) {
      row += static_cast<std::int32_t>(rng() % 50);
      const auto count = static_cast<std::int32_t>(rng() % 400);
      for (std::int64_t k = 0; k < static_cast<std::int64_t>(rng() % 4); ++k) {
        tasks.push_back(task(row, count, 64 * k));
      }
      row += count;
    }
    std::shuffle(tasks.begin(), tasks.end(), rng);
    const MergePlan plan =
        plan_merges(tasks, row, [](const SbmmTask& t) { return t.num_rows >= 128; });
    std::vector<int> owners(static_cast<std::size_t>(row));
    std::size_t num_tasks = 0;
    const auto own = [&](std::int32_t first, std::int32_t count) {
      for (std::int32_t r = first; r < first + count; ++r) ++owners.at(static_cast<std::size_t>(r));
    };
    for (const MergePlan::Rows& rows : plan.base) own(rows.first, rows.count);
    for (const MergePlan::Segment& segment : plan.merged) {
      own(segment.first_row, segment.num_rows);
      num_tasks += segment.tasks.size();
      EXPECT_GE(segment.num_rows, 128);
    }
    for (const int count : owners) EXPECT_EQ(count, 1);
    for (const SbmmTask& t : tasks) num_tasks -= t.num_rows >= 128 ? 1 : 0;
    EXPECT_EQ(num_tasks, 0u);
  }
}

// Shares of a streamed product: contiguous, none empty, owner() the inverse of first_unit().
TEST(ScheduleTest, SharesCoverAllUnits) {
  std::mt19937 rng(7);
  for (int round = 0; round < 2000; ++round) {
    const auto out = 1 + static_cast<std::int64_t>(rng() % 40000);
    const auto in = 8 * (1 + static_cast<std::int64_t>(rng() % 2400));
    const int num_sms = 1 + static_cast<int>(rng() % 264);
    const base_gemm::Schedule schedule = base_gemm::make_schedule(out, in, num_sms);
    ASSERT_EQ(schedule.first_unit(0), 0u);
    ASSERT_EQ(schedule.first_unit(schedule.num_ctas), schedule.num_units);
    for (std::uint32_t cta = 0; cta < schedule.num_ctas; ++cta) {
      const std::uint32_t first = schedule.first_unit(cta), end = schedule.first_unit(cta + 1);
      ASSERT_LT(first, end);
      ASSERT_EQ(schedule.owner(first), cta);
      ASSERT_EQ(schedule.owner(end - 1), cta);
    }
  }
}

}  // namespace
}  // namespace deltazip::cuda
