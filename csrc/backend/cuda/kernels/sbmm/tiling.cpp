#include "backend/cuda/kernels/sbmm/tiling.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "backend/cuda/kernels/sbmm/record.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

constexpr int kTiles = 4;  // of 32 columns, and of 16 rows, in a record

// What a code that stands for zero, or as near as the type has one, fills a padded block with.
int padding_byte(DeltaType type) {
  if (type == DeltaType::kDenseInt8) return 0x80;
  return type == DeltaType::kSparse24Int4 || type == DeltaType::kDenseInt4 ? 0x88 : 0;
}

template <typename Word>
Word load(const std::uint8_t* from) {
  Word word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

void store(std::uint8_t* to, std::uint32_t word) { std::memcpy(to, &word, sizeof(word)); }

// One record's rows as the file has them, padded: [row][tile of 32 columns][bytes of a block].
struct Rows {
  std::uint8_t values[kRecordRows * kTiles * 32];
  std::uint8_t indices[kRecordRows * kTiles * 4];
  std::int64_t value_bytes;  // of a block

  const std::uint8_t* value(int row, int tile) const {
    return values + (row * kTiles + tile) * value_bytes;
  }
  std::uint32_t index(int row, int tile) const {
    return load<std::uint32_t>(indices + (row * kTiles + tile) * 4);
  }
};

// A record's words of one lane or row each, by their places (record.h): tile e = 2 y + r of a pair
// of row tiles, half h of its columns is the file's block 2 y + h, rows q + 8 t.
template <typename Body>
void for_each_block(const Body& body) {
  for (int pair = 0; pair < 2; ++pair) {
    for (int r = 0; r < 2; ++r) {
      for (int q = 0; q < 8; ++q) {
        for (int block = 0; block < kTiles; ++block) body(pair, r, q, block / 2, block % 2);
      }
    }
  }
}
constexpr int row_of(int pair, int r, int q, int t) { return 32 * pair + 16 * r + 8 * t + q; }

void put_indices(std::uint8_t* out, const Rows& rows) {
  for_each_block([&](int pair, int r, int q, int y, int h) {
    for (int t = 0; t < 2; ++t) {
      const int lane = pair * 32 + 4 * q + 2 * h + t;
      store(out + 4 * (lane * 4 + 2 * y + r), rows.index(row_of(pair, r, q, t), 2 * y + h));
    }
  });
}

// Nibble i of v to byte i.
constexpr std::uint32_t spread_nibbles(std::uint32_t v) {
  return (v & 0xFu) | (v & 0xF0u) << 4 | (v & 0xF00u) << 8 | (v & 0xF000u) << 12;
}

// A lane has two groups of each block, four codes.
void put_int4(std::uint8_t* out, const Rows& rows) {
  for_each_block([&](int pair, int r, int q, int y, int h) {
    const std::uint8_t* upper = rows.value(row_of(pair, r, q, 0), 2 * y + h);
    const std::uint8_t* lower = rows.value(row_of(pair, r, q, 1), 2 * y + h);
    for (int c = 0; c < 4; ++c) {
      const std::uint32_t word = spread_nibbles(load<std::uint16_t>(upper + 2 * c)) |
                                 spread_nibbles(load<std::uint16_t>(lower + 2 * c)) << 4;
      store(out + 4 * (((2 * pair + y) * 32 + 4 * q + c) * 4 + 2 * r + h), word ^ 0x88888888u);
    }
  });
}

// Bits 2 i of v to byte i.
constexpr std::uint32_t spread_fields(std::uint32_t v) {
  return (v & 3u) | (v & 0xCu) << 6 | (v & 0x30u) << 12 | (v & 0xC0u) << 18;
}

void put_int2(std::uint8_t* out, const Rows& rows) {
  for (int pair = 0; pair < 2; ++pair) {
    for (int r = 0; r < 2; ++r) {
      for (int q = 0; q < 8; ++q) {
        for (int y = 0; y < 2; ++y) {
          std::uint32_t words[4] = {};
          for (int h = 0; h < 2; ++h) {
            for (int t = 0; t < 2; ++t) {
              const std::uint8_t* codes = rows.value(row_of(pair, r, q, t), 2 * y + h);
              for (int c = 0; c < 4; ++c) words[c] |= spread_fields(codes[c]) << (2 * (t + 2 * h));
            }
          }
          for (int c = 0; c < 4; ++c) {
            store(out + 4 * ((pair * 32 + 4 * q + c) * 4 + 2 * y + r), words[c] ^ 0xAAAAAAAAu);
          }
        }
      }
    }
  }
}

// Two codes of ten bits to two bits of each plane, a plane a byte: a, b, c, s0, s1.
std::array<std::uint64_t, 1024> make_ternary_table() {
  const auto states = ternary_states();
  std::array<std::uint64_t, 32> single{};
  for (std::size_t code = 0; code < 32; ++code) {
    const TernaryState& state = states[code];
    unsigned index0 = state.index0, index1 = state.index1;
    bool first_minus = state.value0 < 0, second_minus = state.value1 < 0;
    const bool is_single = state.value0 == 0 || state.value1 == 0;
    if (is_single) {
      // Any single place is one of the pairs (0,1) and (2,3), and equal signs keep the first.
      const unsigned place = state.value0 != 0 ? index0 : index1;
      const bool minus = state.value0 + state.value1 < 0;
      index0 = place & 2u, index1 = index0 + 1;
      first_minus = place % 2 == 0 ? minus : !minus;
      second_minus = minus;
    }
    unsigned a = 0, b = 0, c = 0;
    if (index0 == 0 && index1 == 1) {
      c = is_single;
    } else if (index0 == 2) {
      b = 1, c = is_single;
    } else {
      a = 1, b = index0, c = index1 - 2;
    }
    single[code] = std::uint64_t{a} | std::uint64_t{b} << 8 | std::uint64_t{c} << 16 |
                   std::uint64_t{first_minus} << 24 | std::uint64_t{second_minus} << 32;
  }
  std::array<std::uint64_t, 1024> table{};
  for (std::size_t codes = 0; codes < 1024; ++codes) {
    table[codes] = single[codes % 32] | single[codes / 32] << 1;
  }
  return table;
}

// Bit p to bit 4 p.
constexpr std::uint32_t spread_bits(std::uint32_t v) {
  v = (v | v << 12) & 0x000F000Fu;
  v = (v | v << 6) & 0x03030303u;
  return (v | v << 3) & 0x11111111u;
}

// See decode.cuh for the places of the bits.
void put_ternary(std::uint8_t* out, const Rows& rows) {
  static const std::array<std::uint64_t, 1024> kTable = make_ternary_table();
  std::uint32_t words[2][32][5] = {};  // of a lane: planes a, b, c, signs 0, signs 1
  for_each_block([&](int pair, int r, int q, int y, int h) {
    const int e = 2 * y + r;
    for (int t = 0; t < 2; ++t) {
      const std::uint8_t* from = rows.value(row_of(pair, r, q, t), 2 * y + h);
      const std::uint64_t codes = load<std::uint32_t>(from) | static_cast<std::uint64_t>(from[4])
                                                                  << 32;
      std::uint64_t bytes = 0;  // a byte a plane, a bit a group
      for (unsigned i = 0; i < 4; ++i) bytes |= kTable[codes >> (10 * i) & 1023u] << (2 * i);
      for (int plane = 0; plane < 3; ++plane) {
        const auto groups = static_cast<std::uint32_t>(bytes >> (8 * plane) & 255u);
        words[pair][4 * q + 2 * h + t][plane] |= spread_bits(groups) << e;
      }
      for (int sign = 0; sign < 2; ++sign) {
        const auto groups = static_cast<std::uint32_t>(bytes >> (24 + 8 * sign) & 255u);
        for (int c = 0; c < 4; ++c) {
          const std::uint32_t two = groups >> (2 * c);
          words[pair][4 * q + c][3 + sign] |= ((two & 1u) | (two & 2u) << 7)
                                              << (16 * h + 4 * t + e);
        }
      }
    }
  });
  for (int lane = 0; lane < 64; ++lane) {
    const auto& from = words[lane / 32][lane % 32];
    for (int i = 0; i < 4; ++i) store(out + 4 * (lane * 4 + i), from[i]);
    store(out + kTernarySecondSigns + 4 * lane, from[4]);
  }
}

// A lane of tile (r, j) holds rows q and q + 8, columns 4 c .. + 3 and those 16 further: the
// registers of a dense 16x8x32 product.
void put_dense(std::uint8_t* out, const Rows& rows, bool is_int4) {
  for (int r = 0; r < 4; ++r) {
    for (int j = 0; j < kTiles; ++j) {
      for (int lane = 0; lane < 32; ++lane) {
        const int q = lane / 4, c = lane % 4;
        const std::uint8_t* upper = rows.value(16 * r + q, j);
        const std::uint8_t* lower = rows.value(16 * r + q + 8, j);
        const int at = (r * kTiles + j) * 32 + lane;
        for (int half = 0; half < 2; ++half) {
          const int column = 16 * half + 4 * c;
          if (is_int4) {
            const std::uint32_t word = spread_nibbles(load<std::uint16_t>(upper + column / 2)) |
                                       spread_nibbles(load<std::uint16_t>(lower + column / 2)) << 4;
            store(out + 4 * (at * 2 + half), word ^ 0x88888888u);
          } else {
            store(out + 4 * (at * 4 + 2 * half), load<std::uint32_t>(upper + column) ^ 0x80808080u);
            store(out + 4 * (at * 4 + 2 * half + 1),
                  load<std::uint32_t>(lower + column) ^ 0x80808080u);
          }
        }
      }
    }
  }
}

void put_record(std::uint8_t* out, DeltaType type, const RecordLayout& layout, const Rows& rows) {
  switch (type) {
    case DeltaType::kSparse24Int4:
      put_int4(out, rows);
      return put_indices(out + layout.values_bytes, rows);
    case DeltaType::kSparse24Int2:
      put_int2(out, rows);
      return put_indices(out + layout.values_bytes, rows);
    case DeltaType::kSparse24Ternary:
      return put_ternary(out, rows);
    case DeltaType::kDenseInt4:
    case DeltaType::kDenseInt8:
      return put_dense(out, rows, type == DeltaType::kDenseInt4);
    case DeltaType::kSparse14Sign:  // comes as ternary
      return;
  }
}

}  // namespace

std::size_t tiled_delta_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                              std::int32_t group_size) {
  check_delta_shape(rows, columns, group_size);
  const RecordLayout layout = record_layout(type, rows, columns, group_size);
  return static_cast<std::size_t>(layout.row_blocks * layout.records * layout.record_bytes);
}

void tile_delta(void* tiled, const DeltaSource& source) {
  check_delta_source(source);
  const RecordLayout layout =
      record_layout(source.type, source.rows, source.columns, source.group_size);
  const std::int64_t blocks = (source.columns + kDeltaBlockColumns - 1) / kDeltaBlockColumns;
  const std::int64_t groups = (source.columns + source.group_size - 1) / source.group_size;
  Rows rows;
  rows.value_bytes = delta_block_bytes(source.type);

  const auto* values = reinterpret_cast<const std::uint8_t*>(source.values.data());
  const auto* indices = reinterpret_cast<const std::uint8_t*>(source.indices.data());
  const auto* scales = reinterpret_cast<const std::uint8_t*>(source.scales.data());
  const std::int64_t part_columns = kRecordColumns / layout.scale_parts;
  auto* out = static_cast<std::uint8_t*>(tiled);
  for (std::int64_t block = 0; block < layout.row_blocks; ++block) {
    const std::int64_t first_row = block * kRecordRows;
    const auto num_rows =
        static_cast<int>(std::min<std::int64_t>(kRecordRows, source.rows - first_row));
    for (std::int64_t record = 0; record < layout.records; ++record, out += layout.record_bytes) {
      const std::int64_t first_block = record * kTiles;
      const std::int64_t num_blocks = std::min<std::int64_t>(kTiles, blocks - first_block);
      if (num_rows < kRecordRows || num_blocks < kTiles) {
        std::memset(rows.values, padding_byte(source.type), sizeof(rows.values));
        std::memset(rows.indices, 0x44, sizeof(rows.indices));
      }
      for (int row = 0; row < num_rows; ++row) {
        const std::int64_t at = (first_row + row) * blocks + first_block;
        std::memcpy(rows.values + row * kTiles * rows.value_bytes, values + at * rows.value_bytes,
                    static_cast<std::size_t>(num_blocks * rows.value_bytes));
        if (has_indices(source.type)) {
          std::memcpy(rows.indices + row * kTiles * 4, indices + at * 4,
                      static_cast<std::size_t>(num_blocks * 4));
        }
      }
      put_record(out, source.type, layout, rows);
      std::uint8_t* scale_out = out + layout.scales_offset;
      std::memset(scale_out, 0, static_cast<std::size_t>(layout.scale_parts * kScalePartBytes));
      for (int part = 0; part < layout.scale_parts; ++part, scale_out += kScalePartBytes) {
        const std::int64_t column = record * kRecordColumns + part * part_columns;
        if (column >= source.columns) break;
        const std::int64_t group = column / source.group_size;
        for (int row = 0; row < num_rows; ++row) {
          std::memcpy(scale_out + 2 * scale_place(row),
                      scales + ((first_row + row) * groups + group) * 2, 2);
        }
      }
    }
  }
}

}  // namespace deltazip::cuda
