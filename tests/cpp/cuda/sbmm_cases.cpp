#include "cuda/sbmm_cases.h"

#include "deltazip/base/dtype.h"

namespace deltazip::bench {
namespace {

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

void fill_random(std::vector<std::uint8_t>& bytes, std::mt19937_64& rng) {
  for (std::size_t i = 0; i < bytes.size(); i += 8) {
    const std::uint64_t word = rng();
    std::memcpy(bytes.data() + i, &word, std::min<std::size_t>(8, bytes.size() - i));
  }
}

}  // namespace

RandomDelta::RandomDelta(DeltaType type_, std::int64_t rows_, std::int64_t columns_,
                         std::int32_t group_size_, std::mt19937_64& rng, bool with_dense)
    : type(type_), rows(rows_), columns(columns_), group_size(group_size_) {
  const std::int64_t blocks = divide_up(columns, 32), groups = divide_up(columns, group_size);
  const std::int64_t block_bytes[] = {8, 4, 5, 16, 32};
  const std::int64_t bytes = block_bytes[static_cast<int>(type)];
  values.resize(static_cast<std::size_t>(rows * blocks * bytes));
  fill_random(values, rng);
  const bool has_indices = type == DeltaType::kSparse24Int4 || type == DeltaType::kSparse24Int2;
  if (has_indices) {
    constexpr std::uint8_t kNibbles[6] = {4, 8, 12, 9, 13, 14};
    std::uint8_t pairs[256];
    for (int i = 0; i < 256; ++i) {
      pairs[i] = static_cast<std::uint8_t>(kNibbles[i % 6] | kNibbles[i / 6 % 6] << 4);
    }
    indices.resize(static_cast<std::size_t>(rows * blocks * 4));
    fill_random(indices, rng);
    for (std::uint8_t& byte : indices) byte = pairs[byte];
  }
  for (std::int64_t i = 0; i < rows * groups; ++i) {
    scales.push_back(to_half(0.002F + 0.018F * static_cast<float>(rng() % 1024) / 1024.0F).bits);
  }
  if (!with_dense) return;
  dense.resize(static_cast<std::size_t>(rows * columns));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::uint8_t* from = values.data() + (row * blocks + block) * bytes;
      float weights[32] = {};
      for (int g = 0; g < 8; ++g) {
        float* w = weights + 4 * g;
        if (has_indices) {
          const int byte = indices[static_cast<std::size_t>((row * blocks + block) * 4 + g / 2)];
          const int nibble = byte >> (4 * (g % 2)) & 15;
          if (type == DeltaType::kSparse24Int4) {
            w[nibble & 3] = static_cast<float>((from[g] & 15) - 8);
            w[nibble >> 2] = static_cast<float>((from[g] >> 4) - 8);
          } else {
            const int codes = from[g / 2] >> (4 * (g % 2));
            w[nibble & 3] = static_cast<float>(2 * (codes & 3) - 3);
            w[nibble >> 2] = static_cast<float>(2 * (codes >> 2 & 3) - 3);
          }
        } else if (type == DeltaType::kSparse24Ternary) {
          std::uint64_t codes = 0;
          std::memcpy(&codes, from, 5);
          const TernaryState& state = ternary_states()[codes >> (5 * g) & 31];
          w[state.index0] = state.value0;
          w[state.index1] = state.value1;
        } else {
          for (int i = 0; i < 4; ++i) {
            const int k = 4 * g + i;
            w[i] = type == DeltaType::kDenseInt8
                       ? static_cast<float>(from[k] - 128)
                       : static_cast<float>((from[k / 2] >> (4 * (k % 2)) & 15) - 8);
          }
        }
      }
      for (std::int64_t k = block * 32; k < std::min(columns, block * 32 + 32); ++k) {
        const Half scale{scales[static_cast<std::size_t>(row * groups + k / group_size)]};
        dense[static_cast<std::size_t>(row * columns + k)] = to_float(scale) * weights[k % 32];
      }
    }
  }
}

DeltaSource RandomDelta::source() const {
  const auto bytes = [](const auto& data) { return std::as_bytes(std::span(data)); };
  return {type, rows, columns, group_size, bytes(values), bytes(indices), bytes(scales)};
}

std::vector<std::uint8_t> RandomDelta::tile() const {
  std::vector<std::uint8_t> out(cuda::tiled_delta_bytes(type, rows, columns, group_size));
  cuda::tile_delta(out.data(), source());
  return out;
}

}  // namespace deltazip::bench
