#pragma once

// The host's part of SBMM: which CTA does what. Plain integers, no CUDA.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/kernels/sbmm/config.h"
#include "backend/cuda/kernels/sbmm/record.h"
#include "deltazip/backend/params.h"

namespace deltazip::cuda {

// A task as the kernel reads it. Its items are (chunk of row blocks, piece of tokens, row block),
// the last fastest.
struct SbmmDeviceTask {
  const void* data;
  std::int32_t first_row, num_rows;
  std::int32_t out_offset, rows, columns;
  std::int32_t row_blocks, records;
  std::int32_t piece_tokens, num_pieces;
  std::int32_t num_chunks;
  std::int32_t record_bytes, scales_offset;
  std::int32_t num_items;
  DeltaType type;
  std::uint8_t scale_parts;
};

// Chunks are about equal. Row blocks before one, and the one that an item is in.
constexpr std::int32_t chunk_begin(const SbmmDeviceTask& task, std::int32_t chunk) {
  return chunk * task.row_blocks / task.num_chunks;
}
constexpr std::int32_t chunk_of(const SbmmDeviceTask& task, std::int32_t item) {
  return ((item / task.num_pieces + 1) * task.num_chunks - 1) / task.row_blocks;
}

// A piece of tokens of a task, and row blocks of a CTA's that share a copy of its x.
struct SbmmSet {
  SbmmDeviceTask task;
  std::int32_t first_token, num_tokens;  // within the task
  std::int32_t begin, end;               // row blocks
};

// Fills in the set that begins with the item of set.task, of those before `end`; how many it is.
constexpr std::int32_t set_place(SbmmSet& set, std::int32_t item, std::int32_t end) {
  const SbmmDeviceTask& task = set.task;
  const auto least = [](std::int32_t a, std::int32_t b) { return a < b ? a : b; };
  const std::int32_t chunk = chunk_of(task, item);
  const std::int32_t first = chunk_begin(task, chunk), next = chunk_begin(task, chunk + 1);
  const std::int32_t at = item - first * task.num_pieces;
  set.first_token = at / (next - first) * task.piece_tokens;
  set.num_tokens = least(task.piece_tokens, task.num_rows - set.first_token);
  set.begin = first + at % (next - first);
  set.end = least(set.begin + end - item, next);
  return set.end - set.begin;
}

// Items [first_item of first_task, last_item of last_task).
struct SbmmCtaRange {
  // The first set, made on the host: before its first loads a CTA should do as little as can be.
  // Without tokens if there is none.
  SbmmSet set;
  std::int32_t first_task, first_item, last_task, last_item;
  std::int32_t set_task, next_item;  // of the first set, and after it
  std::int32_t sum_bytes;            // before x in shared memory, the same for all CTAs
};

// Sizes depend on the number of tasks and CTAs only, so a recorded launch may be refreshed.
struct SbmmPlan {
  std::vector<SbmmDeviceTask> tasks;  // as many as were given
  std::vector<SbmmCtaRange> ranges;   // one a CTA
};

// Tasks with no data or no rows get no items.
void make_sbmm_plan(SbmmPlan& plan, std::span<const SbmmTask> tasks, std::int32_t num_ctas);

}  // namespace deltazip::cuda
