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

// A task as the kernel reads it. Its items are (piece of tokens, row block), the last fastest.
struct SbmmDeviceTask {
  const void* data;
  std::int32_t first_row, num_rows;
  std::int32_t out_offset, rows, columns;
  std::int32_t row_blocks, records;
  std::int32_t piece_tokens;
  std::int32_t record_bytes, scales_offset;
  std::int32_t num_items;
  DeltaType type;
  std::uint8_t scale_parts;
};

// Items [first_item of first_task, last_item of last_task), and how shared memory is divided.
struct SbmmCtaRange {
  std::int32_t first_task, first_item, last_task, last_item;
  // The same for all CTAs:
  std::int32_t sum_bytes;           // of both groups
  std::int32_t x_buffers, x_bytes;  // 1 or 2 of so many bytes
  // A copy of the first task: every dependent load costs a launch of 12 us half a microsecond.
  SbmmDeviceTask task;
};

// Sizes depend on the number of tasks and CTAs only, so a recorded launch may be refreshed.
struct SbmmPlan {
  std::vector<SbmmDeviceTask> tasks;  // as many as were given
  std::vector<SbmmCtaRange> ranges;   // one a CTA
};

// Tasks with no data or no rows get no items.
void make_sbmm_plan(SbmmPlan& plan, std::span<const SbmmTask> tasks, std::int32_t num_ctas);

}  // namespace deltazip::cuda
