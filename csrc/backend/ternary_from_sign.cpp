#include "backend/ternary_from_sign.h"

#include <array>
#include <cstdint>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

constexpr std::size_t kSignBytes = 3, kTernaryBytes = 5;  // of a block's eight codes

// Four codes of 3 bits as four of 5.
constexpr std::array<std::uint32_t, 4096> make_wide() {
  std::array<std::uint32_t, 4096> wide{};
  for (std::uint32_t narrow = 0; narrow < wide.size(); ++narrow) {
    for (std::uint32_t g = 0; g < 4; ++g) wide[narrow] |= (narrow >> (3 * g) & 7u) << (5 * g);
  }
  return wide;
}
constexpr std::array<std::uint32_t, 4096> kWide = make_wide();

}  // namespace

std::vector<std::byte> ternary_from_sign(const DeltaSource& source) {
  DZ_CHECK(source.type == DeltaType::kSparse14Sign,
           "ternary_from_sign: expected sparse14_sign, got ", name(source.type));
  check_delta_source(source);
  const std::size_t num_blocks = source.values.size() / kSignBytes;
  std::vector<std::byte> codes(num_blocks * kTernaryBytes);
  for (std::size_t block = 0; block < num_blocks; ++block) {
    std::uint32_t narrow = 0;
    for (std::size_t i = 0; i < kSignBytes; ++i) {
      narrow |= std::to_integer<std::uint32_t>(source.values[block * kSignBytes + i]) << (8 * i);
    }
    const std::uint64_t wide =
        kWide[narrow & 4095u] | static_cast<std::uint64_t>(kWide[narrow >> 12]) << 20;
    for (std::size_t i = 0; i < kTernaryBytes; ++i) {
      codes[block * kTernaryBytes + i] = static_cast<std::byte>(wide >> (8 * i));
    }
  }
  return codes;
}

}  // namespace deltazip
