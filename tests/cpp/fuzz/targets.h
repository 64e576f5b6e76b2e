#pragma once

#include <cstddef>
#include <span>

namespace deltazip::test {

// What a fuzzer does with one input: reads it, uses everything that a valid one offers, and lets
// InvalidArgument pass. Any other exception comes out. True: the input was valid.
bool try_safetensors(std::span<const std::byte> bytes);
// A content digest that does not fit is mended, or no mutation would get past it.
bool try_delta(std::span<const std::byte> bytes);

}  // namespace deltazip::test
