#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "deltazip/delta/codec.h"

namespace deltazip {

// A tensor's bytes as a packed delta stores them (docs/delta_format.md, "Packed files"): cut into
// chunks, each chunk into a plane for each byte of an element, each plane compressed by itself.
inline constexpr std::size_t kPackedChunkBytes = 256u << 10;  // decoded; stays in L2

// `item_bytes`: of an element, 1, 2 or 4; plain.size() is a multiple of it.
std::vector<std::byte> encode_stream(Codec& codec, std::span<const std::byte> plain,
                                     std::size_t item_bytes);

// Decodes one stream chunk by chunk. What it takes in memory follows the stream's own bytes and
// kPackedChunkBytes, whatever the stream claims. One thread at a time.
class StreamDecoder {
 public:
  // Fills `out` with bytes of the stream from `offset` on.
  using Read = std::function<void(std::size_t offset, std::span<std::byte> out)>;

  // Reads the table and holds it against `encoded_bytes`. `what` begins every message.
  StreamDecoder(Codec& codec, Read read, std::size_t encoded_bytes, std::size_t plain_bytes,
                std::size_t item_bytes, std::string what);

  std::size_t num_chunks() const { return num_chunks_; }
  std::size_t chunk_bytes(std::size_t chunk) const;  // decoded
  // `plain`: chunk_bytes(chunk) long. Throws InvalidArgument.
  void decode(std::size_t chunk, std::span<std::byte> plain);
  // All of it, to `plain`, which is plain_bytes long.
  void decode_all(std::span<std::byte> plain);
  // All of it, in pieces of at most kPackedChunkBytes.
  void stream(const std::function<void(std::size_t offset, std::span<const std::byte>)>& piece);

 private:
  Codec& codec_;
  Read read_;
  std::size_t plain_bytes_, item_bytes_, num_chunks_;
  std::string what_;
  std::vector<std::uint64_t> ends_;  // of each plane's bytes in the stream, chunk by chunk
  std::size_t begin_ = 0;            // of the first
  std::vector<std::byte> encoded_, planes_;
};

}  // namespace deltazip
