#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace deltazip {

// A SHA-256 value: the identity of a checkpoint, a delta, or a run of cached tokens.
struct Digest {
  std::array<std::uint8_t, 32> bytes{};

  std::string hex() const;                        // 64 lower-case characters
  static Digest from_hex(std::string_view text);  // throws InvalidArgument
  auto operator<=>(const Digest&) const = default;
};

// Incremental SHA-256 (OpenSSL's). One thread at a time.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;

  Sha256& update(std::span<const std::byte> bytes);
  Sha256& update(std::string_view text);
  Digest finish();  // resets to the start

 private:
  struct State;
  std::unique_ptr<State> state_;
};

Digest sha256(std::span<const std::byte> bytes);

}  // namespace deltazip

template <>
struct std::hash<deltazip::Digest> {
  std::size_t operator()(const deltazip::Digest& digest) const noexcept {
    std::size_t value = 0;
    for (std::size_t i = 0; i < sizeof(value); ++i) value = (value << 8) | digest.bytes[i];
    return value;
  }
};
