#include "deltazip/base/error.h"

#include <gtest/gtest.h>

namespace deltazip {
namespace {

TEST(ErrorTest, ChecksThrowTheirKindWithTheParts) {
  const auto message = [](auto&& body) -> std::string {
    try {
      body();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message([] { DZ_CHECK(1 > 2, "expected ", 3, ", got ", 4.5); }), "expected 3, got 4.5");
  EXPECT_THROW(DZ_CHECK(false, "x"), InvalidArgument);
  EXPECT_THROW(DZ_INTERNAL(false, "x"), InternalError);
  EXPECT_NE(message([] { DZ_INTERNAL(1 > 2, "why"); }).find("1 > 2"), std::string::npos);
  EXPECT_THROW(detail::fail<NotFound>("variant 'a'"), NotFound);
  EXPECT_THROW(detail::fail<ResourceExhausted>("full"), Error);
}

TEST(ErrorTest, PartsAreEvaluatedOnlyOnFailure) {
  int evaluations = 0;
  const auto describe = [&] { return ++evaluations; };
  DZ_CHECK(true, describe());
  EXPECT_EQ(evaluations, 0);
  EXPECT_THROW(DZ_CHECK(false, describe()), InvalidArgument);
  EXPECT_EQ(evaluations, 1);
}

}  // namespace
}  // namespace deltazip
