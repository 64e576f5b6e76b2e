#pragma once

#include <string>

#include "deltazip/backend/backend.h"
#include "deltazip/base/error.h"

namespace deltazip::testing {

// Why no test can run on a GPU here, as make_backend has it; empty where one can.
inline const std::string& cuda_problem() {
  static const std::string problem = []() -> std::string {
    try {
      make_backend("cuda");
      return "";
    } catch (const Error& error) {
      return error.what();
    }
  }();
  return problem;
}

}  // namespace deltazip::testing
