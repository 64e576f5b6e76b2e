#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "deltazip/base/dtype.h"

namespace deltazip {

// Each gives the index of the first bad element, or nothing. Simple loops over whole spans, which
// the compiler vectorises: a file is checked as fast as memory brings it.

// A byte of `indices` holds two groups; in each index0 < index1. The element is a byte.
std::optional<std::size_t> first_bad_indices(std::span<const std::byte> bytes);
// Floats of `dtype` (float32, float16, bfloat16), aligned to it, that are infinite or NaN.
std::optional<std::size_t> first_not_finite(std::span<const std::byte> bytes, DType dtype);

}  // namespace deltazip
