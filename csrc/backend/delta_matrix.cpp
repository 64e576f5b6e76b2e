#include "deltazip/backend/delta_matrix.h"

#include <array>
#include <utility>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

constexpr std::array kNames{
    std::pair{DeltaType::kSparse24Int4, std::string_view("sparse24_int4")},
    std::pair{DeltaType::kSparse24Int2, std::string_view("sparse24_int2")},
    std::pair{DeltaType::kSparse24Ternary, std::string_view("sparse24_ternary")},
    std::pair{DeltaType::kSparse14Sign, std::string_view("sparse14_sign")},
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

void check_span(const char* what, std::span<const std::byte> bytes, std::int64_t expected,
                const DeltaSource& source) {
  DZ_CHECK(static_cast<std::int64_t>(bytes.size()) == expected, "delta ", name(source.type), " [",
           source.rows, ", ", source.columns, "]: ", what, " must be ", expected, " bytes, got ",
           bytes.size());
}

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

std::int64_t delta_block_bytes(DeltaType type) {
  switch (type) {
    case DeltaType::kSparse24Int4:
      return 8;
    case DeltaType::kSparse24Int2:
      return 4;
    case DeltaType::kSparse24Ternary:
      return 5;
    case DeltaType::kSparse14Sign:
      return 3;
    case DeltaType::kDenseInt4:
      return 16;
    case DeltaType::kDenseInt8:
      return 32;
  }
  return 0;
}

void check_delta_shape(std::int64_t rows, std::int64_t columns, std::int32_t group_size) {
  DZ_CHECK(rows > 0 && columns > 0, "delta: rows and columns must be positive, got [", rows, ", ",
           columns, "]");
  DZ_CHECK(group_size > 0 && group_size % kDeltaBlockColumns == 0,
           "delta: group_size must be a positive multiple of ", kDeltaBlockColumns, ", got ",
           group_size);
}

void check_delta_source(const DeltaSource& source) {
  check_delta_shape(source.rows, source.columns, source.group_size);
  const std::int64_t blocks =
      source.rows * ((source.columns + kDeltaBlockColumns - 1) / kDeltaBlockColumns);
  const std::int64_t groups =
      source.rows * ((source.columns + source.group_size - 1) / source.group_size);
  check_span("values", source.values, blocks * delta_block_bytes(source.type), source);
  check_span("indices", source.indices, has_indices(source.type) ? blocks * 4 : 0, source);
  check_span("scales", source.scales, groups * 2, source);
}

}  // namespace deltazip
