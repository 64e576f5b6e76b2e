#include "deltazip/backend/delta_matrix.h"

#include <array>
#include <utility>

namespace deltazip {
namespace {

constexpr std::array kNames{
    std::pair{DeltaType::kSparse24Int4, std::string_view("sparse24_int4")},
    std::pair{DeltaType::kSparse24Int2, std::string_view("sparse24_int2")},
    std::pair{DeltaType::kSparse24Ternary, std::string_view("sparse24_ternary")},
    std::pair{DeltaType::kDenseInt4, std::string_view("dense_int4")},
    std::pair{DeltaType::kDenseInt8, std::string_view("dense_int8")},
};

constexpr std::array<TernaryState, 32> make_ternary_states() {
  constexpr std::array<std::array<std::uint8_t, 2>, 6> kPairs{
      {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}}};
  std::array<TernaryState, 32> states{};
  for (unsigned code = 0; code < 8; ++code) {
    const auto place = static_cast<std::uint8_t>(code / 2);
    const auto value = static_cast<std::int8_t>(code % 2 == 0 ? 1 : -1);
    if (place < 3) {
      states[code] = {value, 0, place, static_cast<std::uint8_t>(place + 1)};
    } else {
      states[code] = {0, value, 2, 3};
    }
  }
  for (unsigned code = 8; code < 32; ++code) {
    const unsigned d = code - 8;
    states[code] = {static_cast<std::int8_t>((d & 1u) != 0 ? -1 : 1),
                    static_cast<std::int8_t>((d & 2u) != 0 ? -1 : 1), kPairs[d / 4][0],
                    kPairs[d / 4][1]};
  }
  return states;
}

constexpr std::array<TernaryState, 32> kTernaryStates = make_ternary_states();

}  // namespace

std::string_view name(DeltaType type) {
  for (const auto& [value, text] : kNames) {
    if (value == type) return text;
  }
  return "unknown";
}

std::optional<DeltaType> delta_type_from_name(std::string_view name) {
  for (const auto& [value, text] : kNames) {
    if (text == name) return value;
  }
  return std::nullopt;
}

std::span<const TernaryState, 32> ternary_states() { return kTernaryStates; }

}  // namespace deltazip
