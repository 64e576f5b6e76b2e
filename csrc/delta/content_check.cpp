#include "delta/content_check.h"

#include <cstdint>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

constexpr bool is_bad_indices(std::uint8_t byte) {
  const auto low = static_cast<std::uint8_t>(byte & 15u),
             high = static_cast<std::uint8_t>(byte >> 4);
  return (low & 3u) >= (low >> 2) || (high & 3u) >= (high >> 2);
}

// All of `words` first, without a branch inside; then, only when one is bad, which.
template <typename Word, typename IsBad>
std::optional<std::size_t> first_bad(std::span<const std::byte> bytes, IsBad is_bad) {
  const auto* words = reinterpret_cast<const Word*>(bytes.data());
  const std::size_t count = bytes.size() / sizeof(Word);
  Word any = 0;
  for (std::size_t i = 0; i < count; ++i) any |= static_cast<Word>(is_bad(words[i]));
  if (any == 0) return std::nullopt;
  for (std::size_t i = 0; i < count; ++i) {
    if (is_bad(words[i])) return i;
  }
  return std::nullopt;
}

template <typename Word>
std::optional<std::size_t> first_with_full_exponent(std::span<const std::byte> bytes, Word mask) {
  return first_bad<Word>(bytes, [mask](Word word) { return (word & mask) == mask; });
}

}  // namespace

std::optional<std::size_t> first_bad_indices(std::span<const std::byte> bytes) {
  return first_bad<std::uint8_t>(bytes, is_bad_indices);
}

std::optional<std::size_t> first_not_finite(std::span<const std::byte> bytes, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return first_with_full_exponent<std::uint32_t>(bytes, 0x7F800000u);
    case DType::kFloat16:
      return first_with_full_exponent<std::uint16_t>(bytes, 0x7C00u);
    case DType::kBFloat16:
      return first_with_full_exponent<std::uint16_t>(bytes, 0x7F80u);
    default:
      detail::fail<InternalError>("first_not_finite of ", name(dtype));
  }
}

}  // namespace deltazip
