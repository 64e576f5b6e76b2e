#include "deltazip/base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace deltazip {
namespace {

// The value of a float with the given fields, from the definition.
double value_of(std::uint32_t bits, int mantissa_bits, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1u));
  const double mantissa =
      std::ldexp(static_cast<double>(bits & ((1u << mantissa_bits) - 1u)), -mantissa_bits);
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, 1 - bias) : std::ldexp(1.0 + mantissa, exponent - bias);
  return (bits >> (mantissa_bits + exponent_bits)) != 0 ? -magnitude : magnitude;
}

bool is_special(std::uint32_t bits, int mantissa_bits, int exponent_bits) {
  const std::uint32_t mask = (1u << exponent_bits) - 1u;
  return ((bits >> mantissa_bits) & mask) == mask;
}

TEST(DTypeTest, EveryHalfIsItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Half half{static_cast<std::uint16_t>(bits)};
    const float value = to_float(half);
    if (is_special(bits, 10, 5)) {
      EXPECT_EQ(std::isnan(value), (bits & 0x3FFu) != 0) << bits;
      EXPECT_EQ(std::isinf(value), (bits & 0x3FFu) == 0) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(value), value_of(bits, 10, 5)) << bits;
    }
    EXPECT_EQ(std::signbit(value), bits >= 0x8000u) << bits;
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(to_float(to_half(value)))) << bits;
    } else {
      ASSERT_EQ(to_half(value).bits, bits);
    }
  }
}

TEST(DTypeTest, EveryBFloat16IsItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const float value = to_float(BFloat16{static_cast<std::uint16_t>(bits)});
    if (!is_special(bits, 7, 8)) {
      ASSERT_EQ(static_cast<double>(value), value_of(bits, 7, 8)) << bits;
    }
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(to_float(to_bfloat16(value)))) << bits;
    } else {
      ASSERT_EQ(to_bfloat16(value).bits, bits);
    }
  }
}

// Between two neighbours the nearer wins, and the even one at the middle.
TEST(DTypeTest, HalfRoundsToNearestEven) {
  for (std::uint32_t bits = 0; bits < 0x7BFFu; ++bits) {
    const float low = to_float(Half{static_cast<std::uint16_t>(bits)});
    const float high = to_float(Half{static_cast<std::uint16_t>(bits + 1)});
    const float middle = (low + high) / 2;
    ASSERT_EQ(to_half(middle).bits, bits % 2 == 0 ? bits : bits + 1) << bits;
    ASSERT_EQ(to_half(std::nextafter(middle, low)).bits, bits);
    ASSERT_EQ(to_half(std::nextafter(middle, high)).bits, bits + 1);
    ASSERT_EQ(to_half(-std::nextafter(middle, high)).bits, (bits + 1) | 0x8000u);
  }
}

TEST(DTypeTest, BFloat16RoundsToNearestEven) {
  for (std::uint32_t bits = 0; bits < 0x7F7Fu; ++bits) {
    const float low = to_float(BFloat16{static_cast<std::uint16_t>(bits)});
    const float high = to_float(BFloat16{static_cast<std::uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;
    ASSERT_EQ(to_bfloat16(middle).bits, bits % 2 == 0 ? bits : bits + 1) << bits;
    ASSERT_EQ(to_bfloat16(std::nextafter(middle, low)).bits, bits);
    ASSERT_EQ(to_bfloat16(std::nextafter(middle, high)).bits, bits + 1);
  }
}

TEST(DTypeTest, WhatIsTooLargeIsInfinite) {
  EXPECT_EQ(to_half(65519.0F).bits, 0x7BFFu);
  EXPECT_EQ(to_half(65520.0F).bits, 0x7C00u);
  EXPECT_EQ(to_half(-1e30F).bits, 0xFC00u);
  EXPECT_EQ(to_bfloat16(std::numeric_limits<float>::max()).bits, 0x7F80u);
  EXPECT_EQ(to_half(1e-30F).bits, 0u);
}

TEST(DTypeTest, NamesComeBack) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32,
                            DType::kInt64, DType::kUInt8}) {
    EXPECT_EQ(dtype_from_name(name(dtype)), dtype);
    EXPECT_GT(size_of(dtype), 0u);
  }
  EXPECT_EQ(dtype_from_name("float64"), std::nullopt);
  EXPECT_TRUE(is_floating(DType::kBFloat16));
  EXPECT_FALSE(is_floating(DType::kUInt8));
}

}  // namespace
}  // namespace deltazip
