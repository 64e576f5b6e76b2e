#include <cstdint>

#include "targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  deltazip::test::try_delta(std::as_bytes(std::span(data, size)));
  return 0;
}
