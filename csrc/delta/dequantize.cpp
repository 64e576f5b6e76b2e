#include "deltazip/delta/dequantize.h"

#include <array>
#include <cstddef>

#include "deltazip/base/dtype.h"
#include "deltazip/base/error.h"

namespace deltazip {
namespace {

using Bytes = std::span<const std::byte>;

unsigned byte_at(Bytes row, std::size_t index) { return std::to_integer<unsigned>(row[index]); }

// Half a byte: the low one first.
unsigned nibble_at(Bytes row, std::size_t index) {
  return (byte_at(row, index / 2) >> (4 * (index % 2))) & 15u;
}

unsigned code_at(Bytes row, std::size_t group, std::size_t num_bits) {
  unsigned code = 0;
  for (std::size_t bit = 0; bit < num_bits; ++bit) {
    const std::size_t position = num_bits * group + bit;
    code |= ((byte_at(row, position / 8) >> (position % 8)) & 1u) << bit;
  }
  return code;
}

// The four values of a sparse group, not yet scaled.
std::array<float, 4> group_values(DeltaType type, Bytes values, Bytes indices, std::size_t group) {
  std::array<float, 4> out{};
  if (has_states(type)) {
    const std::size_t num_bits = type == DeltaType::kSparse24Ternary ? 5 : 3;
    const TernaryState& state = ternary_states()[code_at(values, group, num_bits)];
    out[state.index0] = state.value0;
    out[state.index1] = state.value1;
    return out;
  }
  const unsigned places = nibble_at(indices, group);
  if (type == DeltaType::kSparse24Int4) {
    out[places & 3u] = static_cast<float>(byte_at(values, group) & 15u) - 8;
    out[places >> 2] = static_cast<float>(byte_at(values, group) >> 4) - 8;
  } else {
    const unsigned codes = nibble_at(values, group);
    out[places & 3u] = 2 * static_cast<float>(codes & 3u) - 3;
    out[places >> 2] = 2 * static_cast<float>(codes >> 2) - 3;
  }
  return out;
}

float scale_at(Bytes scales, std::size_t index) {
  return to_float(Half{static_cast<std::uint16_t>(byte_at(scales, 2 * index) |
                                                  (byte_at(scales, 2 * index + 1) << 8))});
}

}  // namespace

void dequantize_row(const DeltaSource& source, std::int64_t row, std::span<float> out) {
  DZ_CHECK(row >= 0 && row < source.rows, "dequantize_row: row ", row, " of ", source.rows);
  DZ_CHECK(static_cast<std::int64_t>(out.size()) == source.columns, "dequantize_row: room for ",
           out.size(), " columns, the matrix has ", source.columns);
  const auto row_of = [&](Bytes bytes) {
    const std::size_t size = bytes.size() / static_cast<std::size_t>(source.rows);
    return bytes.subspan(static_cast<std::size_t>(row) * size, size);
  };
  const Bytes values = row_of(source.values), indices = row_of(source.indices);
  const Bytes scales = row_of(source.scales);
  const auto group_size = static_cast<std::size_t>(source.group_size);
  for (std::size_t column = 0; column < out.size(); ++column) {
    float value = 0;
    if (is_sparse(source.type)) {
      value = group_values(source.type, values, indices, column / 4)[column % 4];
    } else if (source.type == DeltaType::kDenseInt4) {
      value = static_cast<float>(nibble_at(values, column)) - 8;
    } else {
      value = static_cast<float>(byte_at(values, column)) - 128;
    }
    out[column] = scale_at(scales, column / group_size) * value;
  }
}

}  // namespace deltazip
