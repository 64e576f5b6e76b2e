#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
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

// First in a test of the GPU: skipped with the reason where there is none, or failed where
// DELTAZIP_REQUIRE_GPU says that there must be one.
#define DZ_NEEDS_GPU()                                                     \
  do {                                                                     \
    const std::string& problem = ::deltazip::testing::cuda_problem();      \
    if (problem.empty()) break;                                            \
    if (std::getenv("DELTAZIP_REQUIRE_GPU") != nullptr) FAIL() << problem; \
    GTEST_SKIP() << "no GPU is tested: " << problem;                       \
  } while (false)
