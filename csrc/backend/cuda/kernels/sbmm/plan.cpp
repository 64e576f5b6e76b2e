#include "backend/cuda/kernels/sbmm/plan.h"

#include <algorithm>

#include "backend/cuda/kernels/sbmm/config.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

constexpr std::int64_t x_row_bytes(std::int64_t records) {
  return records * (kRecordColumns * 2) + kXPadBytes;
}

SbmmDeviceTask describe(const SbmmTask& task) {
  SbmmDeviceTask out{};
  out.data = task.num_rows > 0 ? task.delta.data : nullptr;
  if (out.data == nullptr) return out;
  const DeltaMatrix& delta = task.delta;
  const RecordLayout layout =
      record_layout(delta.type, delta.rows, delta.columns, delta.group_size);
  out.first_row = task.first_row;
  out.num_rows = task.num_rows;
  out.out_offset = static_cast<std::int32_t>(task.out_offset);
  out.rows = static_cast<std::int32_t>(delta.rows);
  out.columns = static_cast<std::int32_t>(delta.columns);
  out.row_blocks = static_cast<std::int32_t>(layout.row_blocks);
  out.records = static_cast<std::int32_t>(layout.records);
  out.record_bytes = layout.record_bytes;
  out.scales_offset = layout.scales_offset;
  out.type = delta.type;
  out.scale_parts = static_cast<std::uint8_t>(layout.scale_parts);
  // Pieces of tokens, as equal as can be: x of a piece lies in shared memory.
  const std::int64_t fit = kSharedBytes / (x_row_bytes(layout.records) + kSumBytesPerToken);
  DZ_CHECK(fit > 0, "sbmm: a row of ", delta.columns, " columns exceeds ", kSharedBytes,
           " bytes of shared memory");
  const std::int64_t pieces = divide_up(task.num_rows, std::min<std::int64_t>(fit, kPassTokens));
  out.piece_tokens = static_cast<std::int32_t>(divide_up(task.num_rows, pieces));
  const std::int64_t items = divide_up(task.num_rows, out.piece_tokens) * out.row_blocks;
  DZ_CHECK(items < INT32_MAX, "sbmm: a task has too many items, ", items);
  out.num_items = static_cast<std::int32_t>(items);
  return out;
}

// Shared memory of a launch, the same for all its CTAs.
SbmmCtaRange divide_shared(std::span<const SbmmDeviceTask> tasks) {
  std::int64_t tokens = 1, x = 0;
  for (const SbmmDeviceTask& task : tasks) {
    if (task.num_items == 0) continue;
    tokens = std::max<std::int64_t>(tokens, task.piece_tokens);
    x = std::max(x, task.piece_tokens * x_row_bytes(task.records));
  }
  const std::int64_t sums = tokens * kSumBytesPerToken;
  const std::int64_t room = kSharedBytes - sums;
  SbmmCtaRange out{};
  out.sum_bytes = static_cast<std::int32_t>(sums);
  out.x_bytes = static_cast<std::int32_t>(x);
  out.x_buffers = 2 * x <= room ? 2 : 1;
  DZ_CHECK(x <= room, "sbmm: x of ", x, " bytes and sums of ", sums, " exceed ", kSharedBytes,
           " bytes of shared memory");
  return out;
}

// What a record costs, in bytes read. Decoding bounds the smallest, further tokens add arithmetic.
std::int64_t record_cost(const SbmmDeviceTask& task) {
  constexpr std::int64_t kLeast = 1600, kSecondTile = 600;
  return std::max<std::int64_t>(task.record_bytes, kLeast) +
         (task.piece_tokens > kTokenTile ? kSecondTile : 0);
}

std::int64_t item_cost(const SbmmDeviceTask& task) { return task.records * record_cost(task); }
std::int64_t task_cost(const SbmmDeviceTask& task) { return task.num_items * item_cost(task); }

void share_items(SbmmPlan& plan, std::int32_t num_ctas, const SbmmCtaRange& division) {
  std::int64_t total = 0;
  for (const SbmmDeviceTask& task : plan.tasks) total += task_cost(task);
  plan.ranges.resize(static_cast<std::size_t>(num_ctas));
  const std::size_t num_tasks = plan.tasks.size();
  std::size_t at = 0;
  std::int64_t begin = 0;  // cost before task `at`
  SbmmCtaRange next = division;
  for (std::int32_t cta = 0; cta < num_ctas; ++cta) {
    SbmmCtaRange& range = plan.ranges[static_cast<std::size_t>(cta)];
    range = next;
    if (num_tasks > 0) range.task = plan.tasks[static_cast<std::size_t>(range.first_task)];
    const std::int64_t until = total * (cta + 1) / num_ctas;
    while (at + 1 < num_tasks) {
      const std::int64_t cost = task_cost(plan.tasks[at]);
      if (cost > 0 && begin + cost >= until) break;
      begin += cost;
      ++at;
    }
    range.last_task = static_cast<std::int32_t>(at);
    range.last_item = 0;
    if (at < num_tasks && plan.tasks[at].num_items > 0) {
      const SbmmDeviceTask& task = plan.tasks[at];
      const std::int32_t least = range.first_task == range.last_task ? range.first_item : 0;
      const std::int64_t cost = item_cost(task);
      const std::int64_t item =
          (std::max<std::int64_t>(until - begin, 0) + cost / 2) / cost;  // the nearest
      range.last_item =
          cta + 1 == num_ctas
              ? task.num_items
              : static_cast<std::int32_t>(std::clamp<std::int64_t>(item, least, task.num_items));
    }
    next.first_task = range.last_task;
    next.first_item = range.last_item;
  }
}

// Every launch's pieces must fit together: a wide task may not meet the sums of many tokens.
void narrow_pieces(std::span<SbmmDeviceTask> tasks) {
  std::int64_t x = 0;
  for (const SbmmDeviceTask& task : tasks) {
    if (task.num_items > 0) x = std::max(x, task.piece_tokens * x_row_bytes(task.records));
  }
  const std::int64_t most = std::max<std::int64_t>((kSharedBytes - x) / kSumBytesPerToken, 1);
  for (SbmmDeviceTask& task : tasks) {
    if (task.num_items == 0 || task.piece_tokens <= most) continue;
    const std::int64_t pieces = divide_up(task.num_rows, most);
    task.piece_tokens = static_cast<std::int32_t>(divide_up(task.num_rows, pieces));
    task.num_items =
        static_cast<std::int32_t>(divide_up(task.num_rows, task.piece_tokens) * task.row_blocks);
  }
}

}  // namespace

void make_sbmm_plan(SbmmPlan& plan, std::span<const SbmmTask> tasks, std::int32_t num_ctas) {
  plan.tasks.clear();
  for (const SbmmTask& task : tasks) plan.tasks.push_back(describe(task));
  narrow_pieces(plan.tasks);
  share_items(plan, num_ctas, divide_shared(plan.tasks));
}

}  // namespace deltazip::cuda
