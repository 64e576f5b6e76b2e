#include "backend/cuda/merge_plan.h"

#include <algorithm>
#include <tuple>

namespace deltazip::cuda {

MergePlan plan_merges(std::span<const SbmmTask> tasks, std::int64_t num_rows,
                      bool (*merges)(const SbmmTask& task)) {
  MergePlan plan;
  std::vector<SbmmTask> large;
  for (const SbmmTask& task : tasks) {
    if (task.delta.data == nullptr || task.num_rows == 0) continue;
    (merges(task) ? large : plan.sparse).push_back(task);
  }
  std::ranges::sort(large, {},
                    [](const SbmmTask& t) { return std::tuple(t.first_row, t.out_offset); });
  std::int32_t next = 0;  // the first row not yet given to anyone
  const auto base_until = [&](std::int32_t row) {
    if (row > next) plan.base.push_back({next, row - next});
  };
  for (const SbmmTask& task : large) {
    if (plan.merged.empty() || plan.merged.back().first_row != task.first_row) {
      base_until(task.first_row);
      plan.merged.push_back({task.first_row, task.num_rows, {}});
      next = task.first_row + task.num_rows;
    }
    plan.merged.back().tasks.push_back(task);
  }
  base_until(static_cast<std::int32_t>(num_rows));
  return plan;
}

}  // namespace deltazip::cuda
