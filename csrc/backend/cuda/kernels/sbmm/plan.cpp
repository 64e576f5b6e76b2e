#include "backend/cuda/kernels/sbmm/plan.h"

#include <algorithm>

#include "backend/cuda/kernels/sbmm/config.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

constexpr std::int64_t x_pitch(const SbmmDeviceTask& task) {
  return task.segment_records * (kRecordColumns * 2) + kXPadBytes;
}

// Shared memory of a launch, the same for all its CTAs.
struct Division {
  std::int32_t stage_bytes, num_stages, x_buffers, x_bytes, sum_tiles;
};

constexpr std::int64_t sum_bytes(int tiles) {
  return 2 * kColumnParts * kTokenTile * tiles * kSumPitch * static_cast<int>(sizeof(float));
}

Division divide_shared(std::span<const SbmmDeviceTask> tasks) {
  std::int64_t stage = 0, wanted = 0, most_tokens = 0;
  for (const SbmmDeviceTask& task : tasks) {
    if (task.data == nullptr || task.num_rows == 0) continue;
    const std::int64_t tokens = std::min(task.num_rows, kMaxPieceTokens);
    stage = std::max<std::int64_t>(stage, task.stage_records * task.record_bytes);
    wanted = std::max(wanted, tokens * task.segments * x_pitch(task));
    most_tokens = std::max(most_tokens, tokens);
  }
  if (stage == 0) return {kRecordColumns, 1, 1, 0, 1};
  const int tiles = most_tokens > kTokenTile ? kMaxTiles : 1;
  const std::int64_t room = kSharedBytes - kBarrierBytes - sum_bytes(tiles);
  const auto stages_in = [&](std::int64_t bytes) {
    return std::clamp<std::int64_t>(bytes / stage, 2, kMaxStages);
  };
  // Two buffers of x hide the change from one task to the next; one full buffer beats panels.
  const std::int64_t least = stages_in(kStageBytesLeast) * stage;
  std::int64_t x_buffers = 2 * wanted <= room - least ? 2 : 1;
  const std::int64_t stages =
      wanted * x_buffers <= room - least
          ? stages_in(std::min<std::int64_t>(kStageBytesWanted, room - wanted * x_buffers))
          : stages_in(kStageBytesLeast);
  const std::int64_t x_bytes = (room - stages * stage) / x_buffers / 16 * 16;
  return {static_cast<std::int32_t>(stage), static_cast<std::int32_t>(stages),
          static_cast<std::int32_t>(x_buffers), static_cast<std::int32_t>(x_bytes), tiles};
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
  out.segments = static_cast<std::int32_t>(divide_up(layout.records, segment_records(delta.type)));
  out.segment_floor = out.records / out.segments;
  out.longer_segments = out.records % out.segments;
  out.record_bytes = layout.record_bytes;
  out.scales_offset = layout.scales_offset;
  out.type = delta.type;
  out.scale_parts = static_cast<std::uint8_t>(layout.scale_parts);
  out.stage_records = static_cast<std::uint8_t>(stage_records(delta.type));
  out.segment_records = static_cast<std::uint8_t>(divide_up(out.records, out.segments));
  return out;
}

// Pieces of tokens as equal as can be, panels likewise.
void divide_task(SbmmDeviceTask& task, std::int64_t x_bytes, bool whole_row_blocks) {
  const std::int64_t all = whole_row_blocks ? task.segments : 1;
  std::int64_t most = std::min<std::int64_t>(whole_row_blocks ? kPassTokens : kMaxPieceTokens,
                                             x_bytes / (x_pitch(task) * all));
  if (most > kTokenTile) most = most / kTokenTile * kTokenTile;
  DZ_CHECK(most > 0, "sbmm: a delta of ", task.columns,
           " columns needs more shared memory for one row of x than there is, ", x_bytes, " bytes");
  const std::int64_t pieces = divide_up(task.num_rows, most);
  std::int64_t tokens = divide_up(task.num_rows, pieces);
  if (pieces > 1) tokens = std::min(most, divide_up(tokens, kTokenTile) * kTokenTile);
  const std::int64_t fit =
      std::min<std::int64_t>(task.segments, x_bytes / (x_pitch(task) * tokens));
  task.piece_tokens = static_cast<std::int32_t>(tokens);
  task.panel_segments =
      static_cast<std::int32_t>(divide_up(task.segments, divide_up(task.segments, fit)));
  const std::int64_t items = divide_up(task.num_rows, tokens) * task.row_blocks * task.segments;
  DZ_CHECK(items < INT32_MAX, "sbmm: a task has too many items, ", items);
  task.num_items = static_cast<std::int32_t>(items);
}

// What an item costs, in bytes read: further passes over its tokens are arithmetic.
std::int64_t item_cost(const SbmmDeviceTask& task) {
  const std::int64_t bytes = std::int64_t{task.segment_records} * task.record_bytes;
  const std::int64_t passes = divide_up(task.piece_tokens, kPassTokens);
  return bytes + (passes - 1) * bytes / 4;
}

void share_items(SbmmPlan& plan, std::int32_t num_ctas, const Division& division,
                 bool whole_row_blocks) {
  std::int64_t total = 0;
  for (const SbmmDeviceTask& task : plan.tasks) {
    if (task.num_items > 0) total += task.num_items * item_cost(task);
  }
  plan.ranges.resize(static_cast<std::size_t>(num_ctas));
  std::size_t at = 0;
  std::int64_t begin = 0;  // cost before task `at`
  const auto num_tasks = plan.tasks.size();
  std::int32_t task_index = 0, item = 0;
  for (std::int32_t cta = 0; cta < num_ctas; ++cta) {
    SbmmCtaRange& range = plan.ranges[static_cast<std::size_t>(cta)];
    range = {task_index,
             item,
             0,
             0,
             division.stage_bytes,
             division.num_stages,
             division.x_buffers,
             division.x_bytes,
             division.sum_tiles};
    const std::int64_t until = total * (cta + 1) / num_ctas;
    while (at < num_tasks) {
      const SbmmDeviceTask& task = plan.tasks[at];
      const std::int64_t cost = task.num_items > 0 ? task.num_items * item_cost(task) : 0;
      if (begin + cost >= until && cost > 0) break;
      if (at + 1 == num_tasks) break;
      begin += cost;
      ++at;
    }
    if (num_tasks > 0 && plan.tasks[at].num_items > 0) {
      const SbmmDeviceTask& task = plan.tasks[at];
      std::int64_t reach = divide_up(std::max<std::int64_t>(until - begin, 0), item_cost(task));
      if (whole_row_blocks) reach = divide_up(reach, task.segments) * task.segments;
      item = static_cast<std::int32_t>(std::min<std::int64_t>(reach, task.num_items));
    } else {
      item = 0;
    }
    task_index = static_cast<std::int32_t>(at);
    range.last_task = task_index;
    range.last_item = item;
  }
}

}  // namespace

void make_sbmm_plan(SbmmPlan& plan, std::span<const SbmmTask> tasks, const SbmmLimits& limits) {
  plan.tasks.clear();
  for (const SbmmTask& task : tasks) plan.tasks.push_back(describe(task));
  const Division division = divide_shared(plan.tasks);
  std::int64_t scratch = 0, counters = 0;
  for (SbmmDeviceTask& task : plan.tasks) {
    if (task.data == nullptr) continue;
    task.scratch_offset = scratch;
    task.counter_offset = static_cast<std::int32_t>(counters);
    scratch += std::int64_t{task.row_blocks} * task.segments * task.num_rows * kRecordRows;
    counters += std::int64_t{task.row_blocks} * task.num_rows;
  }
  const bool whole_row_blocks = scratch > static_cast<std::int64_t>(limits.scratch_floats) ||
                                counters > static_cast<std::int64_t>(limits.num_counters) ||
                                counters > INT32_MAX;
  plan.scratch_floats = whole_row_blocks ? 0 : static_cast<std::size_t>(scratch);
  plan.num_counters = whole_row_blocks ? 0 : static_cast<std::size_t>(counters);
  for (SbmmDeviceTask& task : plan.tasks) {
    if (task.data != nullptr) divide_task(task, division.x_bytes, whole_row_blocks);
  }
  share_items(plan, limits.num_ctas, division, whole_row_blocks);
}

}  // namespace deltazip::cuda
