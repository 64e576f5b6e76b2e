#include "deltazip/base/log.h"

#include <array>
#include <cstdio>

namespace deltazip {

void log_to_stderr(LogLevel level, std::string_view message) {
  constexpr std::array<const char*, 4> kLabels{"debug", "info", "warning", "error"};
  std::fprintf(stderr, "[%s] %.*s\n", kLabels[static_cast<std::size_t>(level)],
               static_cast<int>(message.size()), message.data());
}

}  // namespace deltazip
