#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace deltazip {

// How one delta matrix is compressed. The names are those of the delta file (docs/delta_format.md).
enum class DeltaType : std::uint8_t {
  kSparse24Int4,     // "sparse24_int4": two of four kept, value code - 8, code 0..15
  kSparse24Int2,     // "sparse24_int2": two of four kept, value 2 * code - 3, that is -3 -1 1 3
  kSparse24Ternary,  // "sparse24_ternary": one of 32 states per four, see ternary_states()
  kDenseInt4,        // "dense_int4": value code - 8
  kDenseInt8,        // "dense_int8": value code - 128
  kSparse14Sign,     // "sparse14_sign": one of four kept, -1 or +1: ternary's first eight states
};

std::string_view name(DeltaType type);
std::optional<DeltaType> delta_type_from_name(std::string_view name);
constexpr bool is_sparse24(DeltaType type) { return type <= DeltaType::kSparse24Ternary; }
constexpr bool is_sparse(DeltaType type) {
  return is_sparse24(type) || type == DeltaType::kSparse14Sign;
}
// One code for each group of four, which the file calls `codes`; other types have `values`.
constexpr bool has_states(DeltaType type) {
  return type == DeltaType::kSparse24Ternary || type == DeltaType::kSparse14Sign;
}
constexpr bool has_indices(DeltaType type) { return type <= DeltaType::kSparse24Int2; }

// The file pads a row's codes to whole blocks of columns; indices take 4 bytes a block.
inline constexpr std::int64_t kDeltaBlockColumns = 32;
std::int64_t delta_block_bytes(DeltaType type);  // of values, for one block

// One state of a ternary group: two kept places, index0 < index1, each -1, 0 or +1.
struct TernaryState {
  std::int8_t value0, value1;
  std::uint8_t index0, index1;
};

// State c < 8: one weight, at c / 2, + if c is even. State c >= 8, d = c - 8: the pair d / 4 of
// (0,1) (0,2) (0,3) (1,2) (1,3) (2,3), first sign - if d & 1, second sign - if d & 2.
// All zero is not a state: it costs 2 % of squared error to do without, and 33 do not fit 5 bits.
std::span<const TernaryState, 32> ternary_states();

// A compressed matrix as it stands in the file: row-major, untiled. Borrowed memory.
// `columns` is the true count; codes cover columns rounded up to 32, scales up to group_size.
struct DeltaSource {
  DeltaType type;
  std::int64_t rows = 0;        // out_features
  std::int64_t columns = 0;     // in_features
  std::int32_t group_size = 0;  // weights of a row that share one fp16 scale, a multiple of 32
  std::span<const std::byte> values;   // int4 sparse: [rows, K/4]; int2 sparse: [rows, K/8];
                                       // ternary: [rows, K/32*5]; sign: [rows, K/32*3];
                                       // dense: [rows, K/2] or [rows, K]
  std::span<const std::byte> indices;  // sparse int: [rows, K/8], else empty
  std::span<const std::byte> scales;   // fp16 [rows, ceil(columns / group_size)]
};

// Throw InvalidArgument for what is no matrix or group size, or a span of the wrong size.
void check_delta_shape(std::int64_t rows, std::int64_t columns, std::int32_t group_size);
void check_delta_source(const DeltaSource& source);

// The same matrix in a backend's own tiling, where the kernels read it.
struct DeltaMatrix {
  const void* data = nullptr;  // nullptr: no delta, the product is zero
  DeltaType type = DeltaType::kSparse24Int4;
  std::int32_t group_size = 0;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

}  // namespace deltazip
