#include <cstddef>
#include <cstdint>
#include <string_view>

#include "deltazip/base/error.h"
#include "deltazip/model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    deltazip::ModelConfig::parse(text).validate();
  } catch (const deltazip::InvalidArgument&) {
    return 0;
  }
  return 0;
}
