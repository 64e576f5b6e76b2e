#pragma once

#include <cstdint>
#include <span>

#include "deltazip/backend/delta_matrix.h"

namespace deltazip {

// Row `row` of a delta as floats, out[0, columns): the meaning of docs/delta_format.md, spelt out.
// The reference that kernels are tested against, and for tools; not fast.
// Throws InvalidArgument: row out of range, `out` not `columns` long.
void dequantize_row(const DeltaSource& source, std::int64_t row, std::span<float> out);

}  // namespace deltazip
