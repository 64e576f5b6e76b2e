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

SbmmDeviceTask describe(const SbmmTask& task, const SbmmTuning& tuning) {
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
  out.spans = static_cast<std::int32_t>(divide_up(layout.records, kSpanRecords));
  out.record_bytes = layout.record_bytes;
  out.scales_offset = layout.scales_offset;
  out.type = delta.type;
  out.scale_parts = static_cast<std::uint8_t>(layout.scale_parts);
  // Pieces of tokens, as equal as can be.
  const std::int64_t pieces = divide_up(task.num_rows, kPassTokens);
  out.piece_tokens = static_cast<std::int32_t>(divide_up(task.num_rows, pieces));
  out.stage_records = tuning.records_per_stage[static_cast<std::size_t>(delta.type)];
  if (out.piece_tokens > kTokenTile) {
    out.stage_records = std::min<std::uint8_t>(out.stage_records, kTwoTileStageRecords);
  }
  const std::int64_t items =
      divide_up(task.num_rows, out.piece_tokens) * out.row_blocks * out.spans;
  DZ_CHECK(items < INT32_MAX, "sbmm: a task has too many items, ", items);
  out.num_items = static_cast<std::int32_t>(items);
  return out;
}

// Shared memory of a launch, the same for all its CTAs.
SbmmCtaRange divide_shared(std::span<const SbmmDeviceTask> tasks, const SbmmTuning& tuning) {
  std::int64_t records = kRecordColumns, records_and_x = 0, wanted = 0, tokens = 1, slot = 0;
  for (const SbmmDeviceTask& task : tasks) {
    if (task.num_items == 0) continue;
    const std::int64_t bytes = std::int64_t{task.stage_records} * task.record_bytes;
    records = std::max(records, bytes);
    records_and_x =
        std::max(records_and_x, bytes + task.piece_tokens * x_row_bytes(task.stage_records));
    wanted = std::max(wanted, task.piece_tokens * x_row_bytes(task.records));
    tokens = std::max<std::int64_t>(tokens, task.piece_tokens);
    slot =
        std::max(slot, std::int64_t{task.spans} * kColumnParts * task.piece_tokens * kRecordRows);
  }
  const std::int64_t sums = 2 * kColumnParts * tokens * kSumPitch * 4;
  const std::int64_t room = kSharedBytes - kBarrierBytes - sums;
  // Two buffers of x hide the change from one task to the next. x that does not fit is fetched
  // again with every stage, from L2.
  const std::int64_t least = std::max<std::int64_t>(kRingBytesLeast, 2 * records);
  const std::int64_t buffers = tuning.always_streams_x      ? 0
                               : 2 * wanted + least <= room ? 2
                               : wanted + least <= room     ? 1
                                                            : 0;
  const std::int64_t stage = buffers == 0 ? std::max(records, records_and_x) : records;
  const std::int64_t ring =
      buffers == 0 ? room : std::min<std::int64_t>(room - buffers * wanted, tuning.ring_bytes);
  const std::int64_t stages = std::min<std::int64_t>(ring / stage, kMaxStages);
  DZ_CHECK(stages >= 2 && slot < INT32_MAX, "sbmm: two stages need ", 2 * stage,
           " bytes of shared memory, there are ", ring);
  SbmmCtaRange out{};
  out.slot_floats = static_cast<std::int32_t>(slot);
  out.stage_bytes = static_cast<std::int32_t>(stage);
  out.num_stages = static_cast<std::int32_t>(stages);
  out.x_buffers = static_cast<std::int32_t>(buffers);
  out.x_bytes = static_cast<std::int32_t>(buffers == 0 ? 0 : wanted);
  out.sum_tokens = static_cast<std::int32_t>(tokens);
  return out;
}

// What a record costs, in bytes read. Decoding bounds the smallest, further tokens add arithmetic.
std::int64_t record_cost(const SbmmDeviceTask& task, bool streams_x) {
  constexpr std::int64_t kLeast = 1600, kSecondTile = 600;
  return std::max<std::int64_t>(task.record_bytes, kLeast) +
         (task.piece_tokens > kTokenTile ? kSecondTile : 0) +
         (streams_x ? std::int64_t{task.piece_tokens} * kRecordColumns : 0);
}

std::int64_t task_cost(const SbmmDeviceTask& task, bool streams_x) {
  return task.num_items / std::max(task.spans, 1) * std::int64_t{task.records} *
         record_cost(task, streams_x);
}

// The item at this cost of a task, to the nearest span or row block.
std::int32_t item_at(const SbmmDeviceTask& task, std::int64_t cost, bool streams_x,
                     bool whole_row_blocks) {
  const std::int64_t record = std::max<std::int64_t>(cost, 0) / record_cost(task, streams_x);
  const std::int64_t block = record / task.records, rest = record % task.records;
  const std::int64_t span =
      whole_row_blocks
          ? (2 * rest >= task.records ? task.spans : 0)
          : std::min<std::int64_t>((rest + kSpanRecords / 2) / kSpanRecords, task.spans);
  return static_cast<std::int32_t>(
      std::min<std::int64_t>(block * task.spans + span, task.num_items));
}

void share_items(SbmmPlan& plan, std::int32_t num_ctas, const SbmmCtaRange& division,
                 bool whole_row_blocks) {
  const bool streams_x = division.x_buffers == 0;
  std::int64_t total = 0;
  for (const SbmmDeviceTask& task : plan.tasks) total += task_cost(task, streams_x);
  plan.ranges.resize(static_cast<std::size_t>(num_ctas));
  const std::size_t num_tasks = plan.tasks.size();
  std::size_t at = 0;
  std::int64_t begin = 0;  // cost before task `at`
  SbmmCtaRange next = division;
  std::int32_t slot = 0;  // of the row block that the next CTA begins within
  for (std::int32_t cta = 0; cta < num_ctas; ++cta) {
    SbmmCtaRange& range = plan.ranges[static_cast<std::size_t>(cta)];
    range = next;
    range.first_slot = slot;
    if (num_tasks > 0) range.task = plan.tasks[static_cast<std::size_t>(range.first_task)];
    const std::int64_t until = total * (cta + 1) / num_ctas;
    while (at + 1 < num_tasks) {
      const std::int64_t cost = task_cost(plan.tasks[at], streams_x);
      if (cost > 0 && begin + cost >= until) break;
      begin += cost;
      ++at;
    }
    range.last_task = static_cast<std::int32_t>(at);
    range.last_item = 0;
    if (at < num_tasks && plan.tasks[at].num_items > 0) {
      const SbmmDeviceTask& task = plan.tasks[at];
      const std::int32_t least = range.first_task == range.last_task ? range.first_item : 0;
      range.last_item =
          cta + 1 == num_ctas
              ? task.num_items
              : std::max(least, item_at(task, until - begin, streams_x, whole_row_blocks));
      const std::int32_t within = range.last_item % task.spans;
      const bool began_it =
          range.first_task != range.last_task || range.first_item <= range.last_item - within;
      if (within > 0 && began_it) slot = cta;
    }
    next.first_task = range.last_task;
    next.first_item = range.last_item;
  }
}

}  // namespace

void make_sbmm_plan(SbmmPlan& plan, std::span<const SbmmTask> tasks, const SbmmLimits& limits) {
  plan.tasks.clear();
  for (const SbmmTask& task : tasks) plan.tasks.push_back(describe(task, limits.tuning));
  const SbmmCtaRange division = divide_shared(plan.tasks, limits.tuning);
  const auto ctas = static_cast<std::size_t>(limits.num_ctas);
  const std::size_t scratch = ctas * static_cast<std::size_t>(division.slot_floats);
  const std::size_t counters = ctas * kPassTokens;
  const bool whole_row_blocks = scratch > limits.scratch_floats || counters > limits.num_counters;
  plan.scratch_floats = whole_row_blocks ? 0 : scratch;
  plan.num_counters = whole_row_blocks ? 0 : counters;
  share_items(plan, limits.num_ctas, division, whole_row_blocks);
}

}  // namespace deltazip::cuda
