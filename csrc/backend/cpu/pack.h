#pragma once

// Base weights and deltas into the layouts of layout.h, and single rows of them back.

#include <cstdint>

#include "deltazip/backend/delta_matrix.h"
#include "deltazip/backend/params.h"
#include "deltazip/base/tensor_view.h"

namespace deltazip::cpu {

std::int64_t packed_weight_bytes(DType dtype, std::int64_t rows, std::int64_t columns);
// Panels [first, last) of `host` [rows, columns].
void pack_weight_panels(void* packed, ConstTensorView host, std::int64_t first, std::int64_t last);
void read_weight_row(float* out, const PackedMatrix& matrix, std::int64_t row);

std::int64_t tiled_delta_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                               std::int32_t group_size);
// Throws InvalidArgument when a span's size does not fit the shape.
void tile_delta(void* tiled, const DeltaSource& source);
// out += row `row` of the delta.
void add_delta_row(float* out, const DeltaMatrix& delta, std::int64_t row);

}  // namespace deltazip::cpu
