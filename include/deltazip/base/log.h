#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "deltazip/base/error.h"

namespace deltazip {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// Where log lines go is given by the owner, as a value; there is no global logger.
// Called from any thread; must not throw.
using LogSink = std::function<void(LogLevel level, std::string_view message)>;

// Writes "[level] message" to stderr.
void log_to_stderr(LogLevel level, std::string_view message);

}  // namespace deltazip
