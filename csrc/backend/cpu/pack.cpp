#include "backend/cpu/pack.h"

#include <algorithm>
#include <cstring>

#include "backend/cpu/layout.h"
#include "deltazip/base/error.h"

namespace deltazip::cpu {
namespace {

template <typename Element>
void pack_panels(Element* packed, const Element* host, DType dtype, std::int64_t rows,
                 std::int64_t columns, std::int64_t first, std::int64_t last) {
  for (std::int64_t panel = first; panel < last; ++panel) {
    Element* out = packed + panel * kWeightPanelRows * columns;
    for (std::int64_t r = 0; r < kWeightPanelRows; ++r) {
      const std::int64_t row = panel * kWeightPanelRows + r;
      Element* place = out + weight_row_place(dtype, r);
      if (row < rows) {
        const Element* from = host + row * columns;
        for (std::int64_t k = 0; k < columns; ++k) place[k * kWeightPanelRows] = from[k];
      } else {
        for (std::int64_t k = 0; k < columns; ++k) place[k * kWeightPanelRows] = Element{};
      }
    }
  }
}

std::uint8_t byte_at(std::span<const std::byte> bytes, std::int64_t index) {
  return static_cast<std::uint8_t>(bytes[static_cast<std::size_t>(index)]);
}

std::uint32_t read_word(std::span<const std::byte> bytes, std::int64_t index) {
  std::uint32_t word;
  std::memcpy(&word, bytes.data() + index, sizeof(word));
  return word;
}

// Every nibble minus 8, as a signed nibble: the top bit turns.
constexpr std::uint32_t kFlipNibbles = 0x88888888u;

// Codes of one row's block of 32 columns, as they stand in the file.
class SourceRow {
 public:
  SourceRow(const DeltaSource& source, std::int64_t row)
      : source_(source), row_(row), blocks_(divide_up(source.columns, kDeltaBlockColumns)) {}

  std::uint32_t values_word(std::int64_t block, std::int64_t word, std::int64_t words) const {
    return read_word(source_.values, ((row_ * blocks_ + block) * words + word) * 4);
  }
  std::uint32_t indices_word(std::int64_t block) const {
    return read_word(source_.indices, (row_ * blocks_ + block) * 4);
  }
  std::uint64_t codes(std::int64_t block, std::int64_t num_bits) const {  // 8 codes of so many
    std::uint64_t codes = 0;
    std::memcpy(&codes, source_.values.data() + (row_ * blocks_ + block) * num_bits,
                static_cast<std::size_t>(num_bits));
    return codes;
  }
  std::uint8_t byte(std::int64_t column) const {
    return byte_at(source_.values, row_ * blocks_ * kDeltaBlockColumns + column);
  }

 private:
  const DeltaSource& source_;
  std::int64_t row_, blocks_;
};

void put_word(char* place, std::int64_t lane, std::uint32_t word) {
  std::memcpy(place + 4 * lane, &word, sizeof(word));
}

void tile_row(char* data, const DeltaLayout& layout, const DeltaSource& source, std::int64_t row) {
  const std::int64_t panel = row / kDeltaPanelRows, lane = row % kDeltaPanelRows;
  const SourceRow from(source, row);
  for (std::int64_t b = 0; b < layout.num_blocks; ++b) {
    char* block = data + panel * layout.panel_bytes + layout.scale_bytes + b * layout.block_bytes;
    switch (source.type) {
      case DeltaType::kSparse24Int4:
        put_word(block, lane, from.values_word(b, 0, 2) ^ kFlipNibbles);
        put_word(block + kWordRowBytes, lane, from.values_word(b, 1, 2) ^ kFlipNibbles);
        put_word(block + 2 * kWordRowBytes, lane, from.indices_word(b));
        break;
      case DeltaType::kSparse24Int2:
        put_word(block, lane, from.values_word(b, 0, 1));
        put_word(block + kWordRowBytes, lane, from.indices_word(b));
        break;
      case DeltaType::kSparse24Ternary: {
        const std::uint64_t codes = from.codes(b, 5);
        const std::int64_t cell = b * layout.num_panels + panel;
        std::uint32_t word = 0;
        for (int g = 0; g < 8; ++g) {
          const auto code = static_cast<std::uint32_t>((codes >> (5 * g)) & 31u);
          word |= (code & 15u) << (4 * g);
          if ((code & 16u) != 0) {
            char* place = data + layout.masks_offset + cell * kMaskRowBytes + 2 * g + lane / 8;
            *place = static_cast<char>(static_cast<unsigned char>(*place) | 1u << (lane % 8));
          }
        }
        put_word(data + cell * kWordRowBytes, lane, word);
        break;
      }
      case DeltaType::kSparse14Sign: {
        const std::uint64_t codes = from.codes(b, 3);
        const std::int64_t cell = b * layout.num_panels + panel;
        const auto low = static_cast<std::uint16_t>(codes);
        std::memcpy(data + cell * kHalfRowBytes + 2 * lane, &low, sizeof(low));
        data[layout.masks_offset + cell * kMaskRowBytes + lane] = static_cast<char>(codes >> 16);
        break;
      }
      case DeltaType::kDenseInt4:
        for (std::int64_t w = 0; w < 4; ++w) {
          put_word(block + w * kWordRowBytes, lane, from.values_word(b, w, 4) ^ kFlipNibbles);
        }
        break;
      case DeltaType::kDenseInt8:
        for (std::int64_t c = 0; c < kDeltaBlockColumns; ++c) {
          block[c * kDeltaPanelRows + lane] =
              static_cast<char>(from.byte(b * kDeltaBlockColumns + c) ^ 0x80u);
        }
        break;
    }
  }
}

// Where the scale of (row, group) stands.
std::int64_t scale_offset(const DeltaLayout& layout, DeltaType type, std::int64_t row,
                          std::int64_t group) {
  const std::int64_t panel = row / kDeltaPanelRows, lane = row % kDeltaPanelRows;
  return has_states(type) ? layout.scales_offset +
                                (group * layout.num_panels + panel) * kScaleRowBytes + 2 * lane
                          : panel * layout.panel_bytes + group * kScaleRowBytes + 2 * lane;
}

}  // namespace

std::int64_t packed_weight_bytes(DType dtype, std::int64_t rows, std::int64_t columns) {
  return divide_up(rows, kWeightPanelRows) * weight_panel_bytes(dtype, columns);
}

void pack_weight_panels(void* packed, ConstTensorView host, std::int64_t first, std::int64_t last) {
  const std::int64_t rows = host.size(0), columns = host.size(1);
  if (host.dtype == DType::kFloat32) {
    pack_panels(static_cast<float*>(packed), static_cast<const float*>(host.data), host.dtype, rows,
                columns, first, last);
  } else {
    pack_panels(static_cast<std::uint16_t*>(packed), static_cast<const std::uint16_t*>(host.data),
                host.dtype, rows, columns, first, last);
  }
}

void read_weight_row(float* out, const PackedMatrix& matrix, std::int64_t row) {
  const std::int64_t panel = row / kWeightPanelRows, columns = matrix.columns;
  const std::int64_t first =
      panel * kWeightPanelRows * columns + weight_row_place(matrix.dtype, row % kWeightPanelRows);
  const auto read = [&]<typename Element>(const Element* data, auto to_value) {
    for (std::int64_t k = 0; k < columns; ++k) {
      out[k] = to_value(data[first + k * kWeightPanelRows]);
    }
  };
  switch (matrix.dtype) {
    case DType::kBFloat16:
      return read(static_cast<const BFloat16*>(matrix.data),
                  [](BFloat16 v) { return to_float(v); });
    case DType::kFloat16:
      return read(static_cast<const Half*>(matrix.data), [](Half v) { return to_float(v); });
    default:
      return read(static_cast<const float*>(matrix.data), [](float v) { return v; });
  }
}

std::int64_t tiled_delta_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                               std::int32_t group_size) {
  check_delta_shape(rows, columns, group_size);
  return delta_layout(type, rows, columns, group_size).total_bytes;
}

void tile_delta(void* tiled, const DeltaSource& source) {
  check_delta_source(source);
  const DeltaLayout layout =
      delta_layout(source.type, source.rows, source.columns, source.group_size);

  char* data = static_cast<char*>(tiled);
  std::memset(data, 0, static_cast<std::size_t>(layout.total_bytes));
  for (std::int64_t row = 0; row < source.rows; ++row) {
    tile_row(data, layout, source, row);
    for (std::int64_t group = 0; group < layout.num_groups; ++group) {
      std::memcpy(data + scale_offset(layout, source.type, row, group),
                  source.scales.data() + (row * layout.num_groups + group) * 2, 2);
    }
  }
}

void add_delta_row(float* out, const DeltaMatrix& delta, std::int64_t row) {
  const DeltaLayout layout = delta_layout(delta.type, delta.rows, delta.columns, delta.group_size);
  const char* data = static_cast<const char*>(delta.data);
  const std::int64_t panel = row / kDeltaPanelRows, lane = row % kDeltaPanelRows;
  const auto word_at = [&](const char* place) {
    std::uint32_t word;
    std::memcpy(&word, place + 4 * lane, sizeof(word));
    return word;
  };
  const auto signed_nibble = [](std::uint32_t nibble) {
    return static_cast<float>(static_cast<int>(nibble & 15u) - ((nibble & 8u) != 0 ? 16 : 0));
  };
  for (std::int64_t b = 0; b < layout.num_blocks; ++b) {
    float values[kDeltaBlockColumns] = {};
    const char* block =
        data + panel * layout.panel_bytes + layout.scale_bytes + b * layout.block_bytes;
    switch (delta.type) {
      case DeltaType::kSparse24Int4:
      case DeltaType::kSparse24Int2: {
        const bool is_int4 = delta.type == DeltaType::kSparse24Int4;
        const std::uint32_t indices = word_at(block + (is_int4 ? 2 : 1) * kWordRowBytes);
        for (unsigned kept = 0; kept < 16; ++kept) {
          const std::uint32_t index = (indices >> (2 * kept)) & 3u;
          float value;
          if (is_int4) {
            value = signed_nibble(word_at(block + kept / 8 * kWordRowBytes) >> (4 * (kept % 8)));
          } else {
            value = 2.0F * static_cast<float>((word_at(block) >> (2 * kept)) & 3u) - 3.0F;
          }
          values[kept / 2 * 4 + index] += value;
        }
        break;
      }
      case DeltaType::kSparse24Ternary: {
        const std::int64_t cell = b * layout.num_panels + panel;
        const std::uint32_t word = word_at(data + cell * kWordRowBytes);
        for (unsigned g = 0; g < 8; ++g) {
          std::uint16_t mask;
          std::memcpy(&mask, data + layout.masks_offset + cell * kMaskRowBytes + 2 * g,
                      sizeof(mask));
          const unsigned code =
              ((word >> (4 * g)) & 15u) | ((static_cast<unsigned>(mask) >> lane) & 1u) << 4;
          const TernaryState& state = ternary_states()[code];
          values[4 * g + state.index0] += static_cast<float>(state.value0);
          values[4 * g + state.index1] += static_cast<float>(state.value1);
        }
        break;
      }
      case DeltaType::kSparse14Sign: {
        const std::int64_t cell = b * layout.num_panels + panel;
        std::uint16_t low;
        std::memcpy(&low, data + cell * kHalfRowBytes + 2 * lane, sizeof(low));
        const auto high =
            static_cast<unsigned char>(data[layout.masks_offset + cell * kMaskRowBytes + lane]);
        const unsigned codes = low | static_cast<unsigned>(high) << 16;
        for (unsigned g = 0; g < 8; ++g) {
          const unsigned code = (codes >> (3 * g)) & 7u;
          values[4 * g + code / 2] = code % 2 == 0 ? 1.0F : -1.0F;
        }
        break;
      }
      case DeltaType::kDenseInt4:
        for (unsigned c = 0; c < kDeltaBlockColumns; ++c) {
          values[c] = signed_nibble(word_at(block + c / 8 * kWordRowBytes) >> (4 * (c % 8)));
        }
        break;
      case DeltaType::kDenseInt8:
        for (std::int64_t c = 0; c < kDeltaBlockColumns; ++c) {
          values[c] =
              static_cast<float>(static_cast<signed char>(block[c * kDeltaPanelRows + lane]));
        }
        break;
    }
    Half scale;
    std::memcpy(&scale, data + scale_offset(layout, delta.type, row, b / layout.blocks_per_group),
                sizeof(scale));
    const float factor = to_float(scale);
    const std::int64_t first = b * kDeltaBlockColumns;
    const std::int64_t num_columns = std::min(kDeltaBlockColumns, delta.columns - first);
    for (std::int64_t c = 0; c < num_columns; ++c) out[first + c] += factor * values[c];
  }
}

}  // namespace deltazip::cpu
