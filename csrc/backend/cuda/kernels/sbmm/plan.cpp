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
  return x_place(static_cast<int>(records)).pitch;
}

// Pieces of at most `most` tokens, as equal as can be: x of a piece lies in shared memory.
void cut_pieces(SbmmDeviceTask& task, std::int64_t most) {
  // Tiles of tokens that are not full cost what full ones do.
  if (task.num_rows > most && most > kTokenTile) most -= most % kTokenTile;
  const std::int64_t pieces = divide_up(task.num_rows, most);
  task.piece_tokens = static_cast<std::int32_t>(divide_up(task.num_rows, pieces));
  task.num_pieces = static_cast<std::int32_t>(divide_up(task.num_rows, task.piece_tokens));
  task.num_chunks = 1;
  const std::int64_t items = std::int64_t{task.num_pieces} * task.row_blocks;
  DZ_CHECK(items < INT32_MAX, "sbmm: a task has too many items, ", items);
  task.num_items = static_cast<std::int32_t>(items);
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
  const std::int64_t fit = kSharedBytes / (x_row_bytes(layout.records) + kSumBytesPerToken);
  DZ_CHECK(fit > 0, "sbmm: a row of ", delta.columns, " columns exceeds ", kSharedBytes,
           " bytes of shared memory");
  cut_pieces(out, std::min<std::int64_t>(fit, kPassTokens));
  return out;
}

// Bytes of partial sums, the same for all CTAs of a launch. Every launch's pieces must fit
// together: a wide task may not meet the sums of many tokens.
std::int32_t divide_shared(std::span<SbmmDeviceTask> tasks) {
  std::int64_t x = 0;
  for (const SbmmDeviceTask& task : tasks) {
    if (task.num_items > 0) x = std::max(x, task.piece_tokens * x_row_bytes(task.records));
  }
  const std::int64_t most = std::max<std::int64_t>((kSharedBytes - x) / kSumBytesPerToken, 1);
  std::int32_t tokens = 1;
  for (SbmmDeviceTask& task : tasks) {
    if (task.num_items == 0) continue;
    if (task.piece_tokens > most) cut_pieces(task, most);
    tokens = std::max(tokens, task.piece_tokens);
  }
  return tokens * kSumBytesPerToken;
}

// What a record costs, in bytes read. Decoding bounds the smallest, further tokens add arithmetic.
std::int64_t record_cost(const SbmmDeviceTask& task) {
  constexpr std::int64_t kLeast = 1500, kMoreTiles = 300;
  return std::max<std::int64_t>(task.record_bytes, kLeast) +
         (task.piece_tokens - 1) / kTokenTile * kMoreTiles;
}

std::int64_t item_cost(const SbmmDeviceTask& task) { return task.records * record_cost(task); }
std::int64_t task_cost(const SbmmDeviceTask& task) { return task.num_items * item_cost(task); }

// Several pieces read the same records. Where a CTA takes a chunk of one piece, those of the other
// pieces run beside it, and all but one find the records in L2. No chunk is smaller than a CTA's
// share: then no CTA gets two.
void cut_chunks(SbmmDeviceTask& task, std::int64_t share_cost) {
  if (task.num_pieces < 2) return;
  const std::int64_t share = divide_up(std::max<std::int64_t>(share_cost, 1), item_cost(task));
  task.num_chunks = static_cast<std::int32_t>(std::max<std::int64_t>(task.row_blocks / share, 1));
}

// Where a CTA's items end that would end with `item`: a chunk's piece stays whole.
std::int64_t border(const SbmmDeviceTask& task, std::int64_t item) {
  if (task.num_chunks == 1 || item >= task.num_items) return item;
  const std::int32_t chunk = chunk_of(task, static_cast<std::int32_t>(item));
  const std::int64_t first = chunk_begin(task, chunk),
                     blocks = chunk_begin(task, chunk + 1) - first;
  const std::int64_t begin = first * task.num_pieces;
  return begin + (item - begin + blocks / 2) / blocks * blocks;
}

// The first set of a range.
void begin_range(SbmmCtaRange& range, std::span<const SbmmDeviceTask> tasks) {
  std::int32_t item = range.first_item;
  for (std::int32_t i = range.first_task; i <= range.last_task && !tasks.empty(); ++i, item = 0) {
    const SbmmDeviceTask& task = tasks[static_cast<std::size_t>(i)];
    const std::int32_t end = i == range.last_task ? range.last_item : task.num_items;
    if (item >= end) continue;
    range.set.task = task;
    range.set_task = i;
    range.next_item = item + set_place(range.set, item, end);
    return;
  }
}

void share_items(SbmmPlan& plan, std::int32_t num_ctas, std::int32_t sum_bytes) {
  std::int64_t total = 0;
  for (const SbmmDeviceTask& task : plan.tasks) total += task_cost(task);
  for (SbmmDeviceTask& task : plan.tasks) {
    if (task.num_items > 0) cut_chunks(task, divide_up(total, num_ctas));
  }
  plan.ranges.resize(static_cast<std::size_t>(num_ctas));
  const std::size_t num_tasks = plan.tasks.size();
  std::size_t at = 0;
  std::int64_t begin = 0;  // cost before task `at`
  SbmmCtaRange next{};
  next.sum_bytes = sum_bytes;
  for (std::int32_t cta = 0; cta < num_ctas; ++cta) {
    SbmmCtaRange& range = plan.ranges[static_cast<std::size_t>(cta)];
    range = next;
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
      range.last_item = cta + 1 == num_ctas ? task.num_items
                                            : static_cast<std::int32_t>(std::clamp<std::int64_t>(
                                                  border(task, item), least, task.num_items));
    }
    begin_range(range, plan.tasks);
    next.first_task = range.last_task;
    next.first_item = range.last_item;
  }
}

}  // namespace

void make_sbmm_plan(SbmmPlan& plan, std::span<const SbmmTask> tasks, std::int32_t num_ctas) {
  plan.tasks.clear();
  for (const SbmmTask& task : tasks) plan.tasks.push_back(describe(task));
  const std::int32_t sum_bytes = divide_shared(plan.tasks);
  share_items(plan, num_ctas, sum_bytes);
}

}  // namespace deltazip::cuda
