#include "deltazip/delta/packed_stream.h"

#include <algorithm>
#include <utility>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

constexpr std::size_t kSizeBytes = 4;  // of a plane's entry in the table, little-endian

// Byte `plane` of every element, one after another; and back.
void take_plane(std::span<const std::byte> items, std::size_t plane, std::size_t item_bytes,
                std::span<std::byte> out) {
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = items[i * item_bytes + plane];
}
void put_plane(std::span<const std::byte> bytes, std::size_t plane, std::size_t item_bytes,
               std::span<std::byte> items) {
  for (std::size_t i = 0; i < bytes.size(); ++i) items[i * item_bytes + plane] = bytes[i];
}

void check_item_bytes(std::size_t item_bytes) {
  DZ_CHECK(item_bytes == 1 || item_bytes == 2 || item_bytes == 4,
           "an element has 1, 2 or 4 bytes, got ", item_bytes);
}

std::size_t chunks_of(std::size_t plain_bytes) {
  return plain_bytes / kPackedChunkBytes + (plain_bytes % kPackedChunkBytes != 0 ? 1 : 0);
}

}  // namespace

std::vector<std::byte> encode_stream(Codec& codec, std::span<const std::byte> plain,
                                     std::size_t item_bytes) {
  check_item_bytes(item_bytes);
  DZ_CHECK(plain.size() % item_bytes == 0, plain.size(), " bytes are no elements of ", item_bytes);
  std::vector<std::byte> out(chunks_of(plain.size()) * item_bytes * kSizeBytes);
  std::vector<std::byte> bytes;
  std::size_t entry = 0;
  for (std::size_t at = 0; at < plain.size(); at += kPackedChunkBytes) {
    const auto chunk = plain.subspan(at, std::min(kPackedChunkBytes, plain.size() - at));
    bytes.resize(chunk.size() / item_bytes);
    for (std::size_t plane = 0; plane < item_bytes; ++plane) {
      take_plane(chunk, plane, item_bytes, bytes);
      const std::vector<std::byte> encoded = codec.encode(bytes);
      for (std::size_t byte = 0; byte < kSizeBytes; ++byte) {
        out[entry++] = static_cast<std::byte>(encoded.size() >> (8 * byte));
      }
      out.insert(out.end(), encoded.begin(), encoded.end());
    }
  }
  return out;
}

StreamDecoder::StreamDecoder(Codec& codec, Read read, std::size_t encoded_bytes,
                             std::size_t plain_bytes, std::size_t item_bytes, std::string what)
    : codec_(codec),
      read_(std::move(read)),
      plain_bytes_(plain_bytes),
      item_bytes_(item_bytes),
      num_chunks_(chunks_of(plain_bytes)),
      what_(std::move(what)) {
  check_item_bytes(item_bytes);
  DZ_CHECK(plain_bytes % item_bytes == 0, what_, plain_bytes, " bytes are no elements of ",
           item_bytes);
  // By division: a hostile shape makes any product overflow.
  DZ_CHECK(num_chunks_ <= encoded_bytes / (kSizeBytes * item_bytes), what_, "has ", encoded_bytes,
           " bytes, too few for the table of ", num_chunks_, " chunks of ", item_bytes, " planes");
  const std::size_t num_planes = num_chunks_ * item_bytes;
  begin_ = num_planes * kSizeBytes;
  std::vector<std::byte> table(begin_);
  read_(0, table);
  ends_.reserve(num_planes);
  std::uint64_t end = begin_;
  for (std::size_t plane = 0; plane < num_planes; ++plane) {
    for (std::size_t byte = 0; byte < kSizeBytes; ++byte) {
      end += std::to_integer<std::uint64_t>(table[plane * kSizeBytes + byte]) << (8 * byte);
    }
    ends_.push_back(end);
  }
  DZ_CHECK(end == encoded_bytes, what_, "has ", encoded_bytes, " bytes, its table makes them ",
           end);
}

std::size_t StreamDecoder::chunk_bytes(std::size_t chunk) const {
  return std::min(kPackedChunkBytes, plain_bytes_ - chunk * kPackedChunkBytes);
}

void StreamDecoder::decode(std::size_t chunk, std::span<std::byte> plain) {
  DZ_INTERNAL(chunk < num_chunks_ && plain.size() == chunk_bytes(chunk), what_, "chunk ", chunk);
  for (std::size_t plane = 0; plane < item_bytes_; ++plane) {
    const std::size_t index = chunk * item_bytes_ + plane;
    const std::uint64_t begin = index == 0 ? begin_ : ends_[index - 1];
    encoded_.resize(ends_[index] - begin);
    read_(begin, encoded_);
    std::span<std::byte> out = plain;
    if (item_bytes_ > 1) {
      planes_.resize(plain.size() / item_bytes_);
      out = planes_;
    }
    try {
      codec_.decode(encoded_, out);
    } catch (const InvalidArgument& error) {
      detail::fail<InvalidArgument>(what_, "chunk ", chunk, " of ", num_chunks_, ": ",
                                    error.what());
    }
    if (item_bytes_ > 1) put_plane(planes_, plane, item_bytes_, plain);
  }
}

void StreamDecoder::decode_all(std::span<std::byte> plain) {
  DZ_INTERNAL(plain.size() == plain_bytes_, what_, "room for ", plain.size(), " bytes");
  for (std::size_t chunk = 0; chunk < num_chunks_; ++chunk) {
    decode(chunk, plain.subspan(chunk * kPackedChunkBytes, chunk_bytes(chunk)));
  }
}

void StreamDecoder::stream(
    const std::function<void(std::size_t, std::span<const std::byte>)>& piece) {
  std::vector<std::byte> buffer(num_chunks_ == 0 ? 0 : chunk_bytes(0));
  for (std::size_t chunk = 0; chunk < num_chunks_; ++chunk) {
    const std::span<std::byte> plain = std::span(buffer).first(chunk_bytes(chunk));
    decode(chunk, plain);
    piece(chunk * kPackedChunkBytes, plain);
  }
}

}  // namespace deltazip
