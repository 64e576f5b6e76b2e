#pragma once

#include <cstddef>
#include <cstdint>

#include "deltazip/backend/delta_matrix.h"

namespace deltazip::cuda {

// Bytes of the whole tiled matrix. Throws InvalidArgument for what is no matrix or group size.
std::size_t tiled_delta_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                              std::int32_t group_size);
// The one re-tiling between file and kernels, host to host: rows and columns are padded to whole
// records with valid indices and zero scales. Throws InvalidArgument when a span's size is wrong.
void tile_delta(void* tiled, const DeltaSource& source);

}  // namespace deltazip::cuda
