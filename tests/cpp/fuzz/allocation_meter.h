#pragma once

#include <cstddef>

namespace deltazip::test {

// Bytes that operator new has given out and not got back, in a binary that links this. One thread.
void reset_allocation_peak();
std::size_t allocation_peak();  // above what was alive at the reset

}  // namespace deltazip::test
