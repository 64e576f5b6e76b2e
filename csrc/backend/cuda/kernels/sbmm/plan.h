#pragma once

// The host's part of SBMM: which CTA does what. Plain integers, no CUDA.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/kernels/sbmm/config.h"
#include "backend/cuda/kernels/sbmm/record.h"
#include "deltazip/backend/params.h"

namespace deltazip::cuda {

// A task as the kernel reads it. Its items are (piece of tokens, row block, span), the last
// fastest.
struct SbmmDeviceTask {
  const void* data;
  std::int32_t first_row, num_rows;
  std::int32_t out_offset, rows, columns;
  std::int32_t row_blocks, records, spans;
  std::int32_t piece_tokens;
  std::int32_t record_bytes, scales_offset;
  std::int32_t num_items;
  DeltaType type;
  std::uint8_t scale_parts, stage_records;
};

// Items [first_item of first_task, last_item of last_task), and how shared memory is divided.
struct SbmmCtaRange {
  std::int32_t first_task, first_item, last_task, last_item;
  // A row block that several CTAs share has the scratch and counters of the CTA with its first
  // span: first_slot for the one that this range begins within.
  std::int32_t first_slot;
  // The same for all CTAs:
  std::int32_t slot_floats;
  std::int32_t stage_bytes, num_stages;
  std::int32_t x_buffers, x_bytes;  // of one buffer; no buffers: x rides in the stages
  std::int32_t sum_tokens;          // of the largest piece
  // A copy of the first task: every dependent load costs a launch of 12 us half a microsecond.
  SbmmDeviceTask task;
};

// Sizes depend on the number of tasks and CTAs only, so a recorded launch may be refreshed.
struct SbmmPlan {
  std::vector<SbmmDeviceTask> tasks;  // as many as were given
  std::vector<SbmmCtaRange> ranges;   // one a CTA
  std::size_t scratch_floats = 0;     // what this launch uses, at most
  std::size_t num_counters = 0;
};

// What measurement chooses; the defaults are what it chose.
struct SbmmTuning {
  std::array<std::uint8_t, 5> records_per_stage = {
      stage_records(DeltaType::kSparse24Int4), stage_records(DeltaType::kSparse24Int2),
      stage_records(DeltaType::kSparse24Ternary), stage_records(DeltaType::kDenseInt4),
      stage_records(DeltaType::kDenseInt8)};  // by DeltaType; divisors of kSpanRecords
  std::int32_t ring_bytes = kRingBytesWanted;
  bool always_streams_x = false;
};

struct SbmmLimits {
  std::int32_t num_ctas = 0;
  std::size_t scratch_floats = 0, num_counters = 0;  // what there is
  SbmmTuning tuning = {};
};

// Tasks with no data or no rows get no items. Where the scratch does not suffice, CTAs take whole
// row blocks, which need none and balance less well.
void make_sbmm_plan(SbmmPlan& plan, std::span<const SbmmTask> tasks, const SbmmLimits& limits);

}  // namespace deltazip::cuda
