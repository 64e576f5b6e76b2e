#include "padding.h"

#include <algorithm>
#include <bit>

#include "deltazip/base/error.h"

namespace deltazip {

bool is_decode(const Batch& batch) {
  if (batch.sequences.size() != batch.tokens.size() ||
      batch.logit_rows.size() != batch.tokens.size()) {
    return false;
  }
  // Logit rows ascend: as many as there are rows are all rows.
  for (std::size_t i = 0; i < batch.sequences.size(); ++i) {
    const AttentionSequence& sequence = batch.sequences[i];
    if (sequence.num_rows != 1 || sequence.first_row != static_cast<std::int32_t>(i)) return false;
  }
  return true;
}

std::int32_t rows_with_padding(const Backend& backend, std::int32_t max_rows) {
  std::int32_t most = max_rows;
  for (std::int32_t rows = 1; rows <= max_rows; ++rows) {
    const std::int32_t padded = backend.padded_rows(rows);
    DZ_INTERNAL(padded == 0 || padded >= rows, "the backend pads ", rows, " rows to ", padded);
    most = std::max(most, padded);
  }
  return most;
}

void pad_decode(const Batch& batch, std::int32_t num_rows, const VariantWeights* base, Batch& out) {
  out = batch;
  const auto first = static_cast<std::int32_t>(batch.tokens.size());
  const auto size = static_cast<std::size_t>(num_rows);
  out.tokens.resize(size, 0);
  out.positions.resize(size, 0);
  out.cache_slots.resize(size, -1);
  out.rope_lengths.resize(size, 1);
  for (std::int32_t row = first; row < num_rows; ++row) {
    out.sequences.push_back({row, 0, 0, nullptr});
    out.logit_rows.push_back(row);
  }
  if (first < num_rows) out.segments.push_back({base, first, num_rows - first});
}

std::int32_t padded_task_capacity(const Batch& batch, const VariantWeights* base) {
  return task_capacity_for(static_cast<std::int32_t>(std::ranges::count_if(
      batch.segments, [base](const Segment& segment) { return segment.variant != base; })));
}

std::int32_t task_capacity_for(std::int32_t num_deltas) {
  return num_deltas == 0
             ? 0
             : static_cast<std::int32_t>(std::bit_ceil(static_cast<std::uint32_t>(num_deltas)));
}

}  // namespace deltazip
