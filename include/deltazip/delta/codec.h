#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

namespace deltazip {

// Lossless compression of one run of bytes by itself. Cheap to make; one thread at a time.
class Codec {
 public:
  // By its name in a manifest: "zstd". Throws InvalidArgument for any other.
  static std::unique_ptr<Codec> make(std::string_view name);
  virtual ~Codec() = default;

  virtual std::vector<std::byte> encode(std::span<const std::byte> plain) = 0;
  // Fills `plain` to its last byte and never beyond. Throws InvalidArgument: `encoded` is damaged,
  // or stands for more or fewer bytes.
  virtual void decode(std::span<const std::byte> encoded, std::span<std::byte> plain) = 0;
};

}  // namespace deltazip
