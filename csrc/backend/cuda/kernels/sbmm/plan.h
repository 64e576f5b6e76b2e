#pragma once

// The host's part of SBMM: which CTA does what. Plain integers, no CUDA.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/kernels/sbmm/record.h"
#include "deltazip/backend/params.h"

namespace deltazip::cuda {

// A task as the kernel reads it. Its items are (piece of tokens, panel of segments, row block,
// segment), the last fastest; a panel's x stands in shared memory while its row blocks pass.
struct SbmmDeviceTask {
  const void* data;
  std::int64_t scratch_offset;  // floats: [row block][segment][token][64 rows]
  std::int32_t counter_offset;  // [row block][token]
  std::int32_t first_row, num_rows;
  std::int32_t out_offset, rows, columns;
  std::int32_t row_blocks, records, segments;
  std::int32_t segment_floor, longer_segments;  // records of a segment; the first few have one more
  std::int32_t piece_tokens, panel_segments;
  std::int32_t record_bytes, scales_offset;
  std::int32_t num_items;
  DeltaType type;
  std::uint8_t scale_parts, stage_records, segment_records;
};

// Items [first_item of first_task, last_item of last_task), and how shared memory is divided.
struct SbmmCtaRange {
  std::int32_t first_task, first_item, last_task, last_item;
  std::int32_t stage_bytes, num_stages;
  std::int32_t x_buffers, x_bytes;  // of one buffer
  std::int32_t sum_tiles;           // token tiles of the largest partial sum
};

// Sizes depend on the number of tasks and CTAs only, so a recorded launch may be refreshed.
struct SbmmPlan {
  std::vector<SbmmDeviceTask> tasks;  // as many as were given
  std::vector<SbmmCtaRange> ranges;   // one a CTA
  std::size_t scratch_floats = 0;     // what this launch uses, at most
  std::size_t num_counters = 0;
};

struct SbmmLimits {
  std::int32_t num_ctas = 0;
  std::size_t scratch_floats = 0, num_counters = 0;  // what there is
};

// Tasks with no data or no rows get no items. Where the scratch does not suffice, CTAs take whole
// row blocks, which need none and balance less well.
void make_sbmm_plan(SbmmPlan& plan, std::span<const SbmmTask> tasks, const SbmmLimits& limits);

}  // namespace deltazip::cuda
