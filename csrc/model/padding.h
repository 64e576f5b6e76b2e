#pragma once

#include <cstdint>

#include "deltazip/model/model.h"

namespace deltazip {

// How a backend's padded_rows() sizes are used: a decode step is filled up to the next of them, so
// that few shapes of steps occur and a device can keep what it launched for each.

// Each sequence has one row, in order, whose logits are wanted.
bool is_decode(const Batch& batch);

// The rows that memory must have for steps of up to `max_rows` rows, padded or not.
std::int32_t rows_with_padding(const Backend& backend, std::int32_t max_rows);

// `batch`, a decode step, filled up to `num_rows`: rows of `base` that are token 0 at position 0,
// that nothing is stored of, and whose sequences have no rows and thus no attention.
void pad_decode(const Batch& batch, std::int32_t num_rows, const VariantWeights* base, Batch& out);

// Room for the delta tasks of one matrix: the number of segments with a delta, rounded up.
std::int32_t padded_task_capacity(const Batch& batch, const VariantWeights* base);
std::int32_t task_capacity_for(std::int32_t num_deltas);

}  // namespace deltazip
