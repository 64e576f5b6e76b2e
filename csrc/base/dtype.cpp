#include "deltazip/base/dtype.h"

#include <array>
#include <cmath>
#include <utility>

namespace deltazip {
namespace {

constexpr std::array kNames{
    std::pair{DType::kFloat32, std::string_view("float32")},
    std::pair{DType::kFloat16, std::string_view("float16")},
    std::pair{DType::kBFloat16, std::string_view("bfloat16")},
    std::pair{DType::kInt32, std::string_view("int32")},
    std::pair{DType::kInt64, std::string_view("int64")},
    std::pair{DType::kUInt8, std::string_view("uint8")},
};

}  // namespace

std::string_view name(DType dtype) {
  for (const auto& [value, text] : kNames) {
    if (value == dtype) return text;
  }
  return "unknown";
}

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const auto& [value, text] : kNames) {
    if (text == name) return value;
  }
  return std::nullopt;
}

float to_float(Half value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (value.bits >> 10) & 0x1Fu;
  const std::uint32_t mantissa = value.bits & 0x3FFu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wide_exponent = exponent == 0x1Fu ? 0xFFu : exponent + 112u;
  return std::bit_cast<float>(sign | (wide_exponent << 23) | (mantissa << 13));
}

Half to_half(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<std::uint16_t>(sign | 0x7E00u)};   // NaN
  if (magnitude >= 0x477FF000u) return {static_cast<std::uint16_t>(sign | 0x7C00u)};  // to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal; the FPU rounds to nearest even
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p24F;
    return {static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(scaled)))};
  }
  const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace deltazip
