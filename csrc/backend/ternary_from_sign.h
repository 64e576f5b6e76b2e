#pragma once

#include <cstddef>
#include <vector>

#include "deltazip/backend/delta_matrix.h"

namespace deltazip {

// The `codes` of a sparse24_ternary matrix that holds what a sparse14_sign one does. Scales are the
// same. Throws InvalidArgument for another type, or a span of the wrong size.
std::vector<std::byte> ternary_from_sign(const DeltaSource& source);

}  // namespace deltazip
