#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace deltazip {

// Root of everything the core throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller's fault: a bad file, shape, name or number. A ValueError in Python.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// A name that nobody knows (variant, request). A KeyError in Python.
class NotFound : public Error {
 public:
  using Error::Error;
};

// A bound was reached: queue full, memory budget spent. The caller may try again later.
class ResourceExhausted : public Error {
 public:
  using Error::Error;
};

// Our fault: an invariant did not hold.
class InternalError : public Error {
 public:
  using Error::Error;
};

namespace detail {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename E, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw E(concat(parts...));
}

}  // namespace detail
}  // namespace deltazip

// The message parts are evaluated only when the check fails.
#define DZ_CHECK(condition, ...)                                          \
  do {                                                                    \
    if (!(condition)) [[unlikely]]                                        \
      ::deltazip::detail::fail<::deltazip::InvalidArgument>(__VA_ARGS__); \
  } while (false)

#define DZ_INTERNAL(condition, ...)                                                       \
  do {                                                                                    \
    if (!(condition)) [[unlikely]]                                                        \
      ::deltazip::detail::fail<::deltazip::InternalError>("internal error: ", #condition, \
                                                          " is false: ", __VA_ARGS__);    \
  } while (false)
