#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "delta/delta_builder.h"
#include "delta/store_fixture.h"
#include "deltazip/base/error.h"
#include "deltazip/delta/delta_file.h"
#include "deltazip/delta/packed_stream.h"

namespace deltazip {
namespace {

using test::AlignedBytes;
using test::DeltaBuilder;
using test::message_of;
using test::small_delta;

std::vector<std::byte> noise(std::size_t size, unsigned symbols) {
  std::mt19937 rng(static_cast<unsigned>(size) + symbols);
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(rng() % symbols);
  return bytes;
}

StreamDecoder::Read reader_of(const std::vector<std::byte>& bytes) {
  return [&bytes](std::size_t offset, std::span<std::byte> out) {
    ASSERT_LE(offset + out.size(), bytes.size());
    if (!out.empty()) std::memcpy(out.data(), bytes.data() + offset, out.size());
  };
}

TEST(PackedStream, GivesBackWhatWentIn) {
  const auto codec = Codec::make("zstd");
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{4}, std::size_t{1000}, kPackedChunkBytes, kPackedChunkBytes + 4,
        3 * kPackedChunkBytes - 8}) {
    for (const std::size_t item_bytes : {1u, 2u, 4u}) {
      for (const unsigned symbols : {1u, 6u, 256u}) {
        const auto plain = noise(size, symbols);
        const auto encoded = encode_stream(*codec, plain, item_bytes);
        StreamDecoder decoder(*codec, reader_of(encoded), encoded.size(), size, item_bytes, "");
        std::vector<std::byte> all(size), pieces;
        decoder.decode_all(all);
        EXPECT_EQ(all, plain) << size << " " << item_bytes << " " << symbols;
        decoder.stream([&](std::size_t offset, std::span<const std::byte> piece) {
          EXPECT_EQ(offset, pieces.size());
          EXPECT_LE(piece.size(), kPackedChunkBytes);
          pieces.insert(pieces.end(), piece.begin(), piece.end());
        });
        EXPECT_EQ(pieces, plain);
      }
    }
  }
}

TEST(PackedStream, TakesWhatTheCodesHold) {
  const auto codec = Codec::make("zstd");
  constexpr std::size_t kSize = 1u << 20;
  // Six symbols are 2.58 bits, a Huffman code's at most 2.67; noise grows by headers alone.
  EXPECT_LT(encode_stream(*codec, noise(kSize, 6), 1).size(), kSize * 2.68 / 8);
  EXPECT_LT(encode_stream(*codec, noise(kSize, 256), 1).size(), kSize + 256);
  EXPECT_LT(encode_stream(*codec, noise(kSize, 1), 1).size(), 512u);
  // Scales of one size: their upper bytes are alike, and lie together.
  std::vector<std::byte> scales = noise(kSize, 256);
  for (std::size_t i = 1; i < kSize; i += 2) scales[i] = std::byte{0x20};
  EXPECT_LT(encode_stream(*codec, scales, 2).size(), kSize * 0.51);
}

TEST(PackedStream, RefusesDamage) {
  const auto codec = Codec::make("zstd");
  const auto plain = noise(kPackedChunkBytes + 100, 6);
  const auto encoded = encode_stream(*codec, plain, 1);
  const auto error = [&](std::vector<std::byte> bytes, std::size_t plain_bytes) {
    return message_of<InvalidArgument>([&] {
      std::vector<std::byte> out(plain_bytes);
      StreamDecoder(*codec, reader_of(bytes), bytes.size(), plain_bytes, 1, "t: ").decode_all(out);
    });
  };
  EXPECT_EQ(error(encoded, plain.size()), "");
  EXPECT_NE(error(encoded, plain.size() + 1).find("t: chunk 1 of 2: zstd"), std::string::npos);
  EXPECT_NE(error(encoded, plain.size() - 1).find("t: chunk 1 of 2: zstd"), std::string::npos);
  EXPECT_NE(error(encoded, 100 * plain.size()).find("t: has"), std::string::npos);
  EXPECT_NE(error({}, plain.size()).find("too few for the table of 2 chunks"), std::string::npos);
  auto cut = encoded;
  cut.pop_back();
  EXPECT_NE(error(cut, plain.size()).find("its table makes them"), std::string::npos);
  auto flipped = encoded;
  flipped[8] ^= std::byte{0xFF};  // zstd's magic number
  EXPECT_NE(error(flipped, plain.size()).find("t: chunk 0 of 2: zstd cannot decode"),
            std::string::npos);
  EXPECT_THROW(Codec::make("lzma"), InvalidArgument);
  EXPECT_THROW(encode_stream(*codec, plain, 3), InvalidArgument);
}

TEST(PackedDelta, IsTheSameRevision) {
  const AlignedBytes plain(small_delta().str()), packed(small_delta().packed().str());
  const auto one = DeltaFile::parse(plain.span(), "plain");
  const auto other = DeltaFile::parse(packed.span(), "packed");
  EXPECT_EQ(one->content_digest(), other->content_digest());
  EXPECT_EQ(one->base_digest(), other->base_digest());
  ASSERT_EQ(one->tensors().size(), other->tensors().size());
  std::vector<std::byte> storage, other_storage;
  const auto equal = [](std::span<const std::byte> a, std::span<const std::byte> b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  };
  for (std::size_t i = 0; i < one->tensors().size(); ++i) {
    const DeltaTensor& unread = other->tensors()[i];
    EXPECT_TRUE(unread.matrix.values.empty()) << "bytes that nobody has decoded";
    const DeltaTensor a = one->load(one->tensors()[i], storage);
    const DeltaTensor b = other->load(unread, other_storage);
    EXPECT_EQ(a.name, b.name);
    EXPECT_EQ(a.kind, b.kind);
    EXPECT_EQ(a.shape, b.shape);
    EXPECT_TRUE(equal(a.matrix.values, b.matrix.values)) << a.name;
    EXPECT_TRUE(equal(a.matrix.indices, b.matrix.indices)) << a.name;
    EXPECT_TRUE(equal(a.matrix.scales, b.matrix.scales)) << a.name;
    if (a.kind != DeltaKind::kReplaced) continue;
    ASSERT_EQ(a.replaced.dtype, b.replaced.dtype);
    ASSERT_EQ(a.replaced.num_bytes(), b.replaced.num_bytes());
    EXPECT_EQ(std::memcmp(a.replaced.data, b.replaced.data, a.replaced.num_bytes()), 0);
  }
}

TEST(PackedDelta, IsTiledAsThePlainOne) {
  test::FakeBackend backend(true);
  const test::TemporaryFolder folder;
  DeltaBuilder builder = small_delta();
  test::write_file(folder.path() / "plain", builder.str());
  test::write_file(folder.path() / "packed", builder.packed().str());
  const auto file = DeltaFile::open(folder.path() / "plain");
  std::vector<BaseTensor> base;
  for (const DeltaTensor& tensor : file->tensors()) base.push_back({tensor.name, tensor.shape});
  DeltaStore store(backend, file->base_digest(), base, 0, 2);
  const auto plain = store.get(store.add(folder.path() / "plain"));
  const auto packed = store.get(store.add(folder.path() / "packed"));
  ASSERT_EQ(plain->bytes.num_bytes(), packed->bytes.num_bytes());
  for (const DeltaPart& part : plain->parts) {
    EXPECT_EQ(std::memcmp(static_cast<const std::byte*>(plain->bytes.data()) + part.offset,
                          static_cast<const std::byte*>(packed->bytes.data()) + part.offset,
                          part.num_bytes),
              0)
        << part.name;
  }
}

constexpr const char* kEmbed = "model.embed_tokens.weight.values";
constexpr const char* kInt2 = "model.layers.0.mlp.up_proj.weight.indices";

TEST(PackedDelta, RefusesWhatIsWrong) {
  struct Bad {
    const char* what;
    std::function<void(DeltaBuilder&)> spoil;
    std::vector<std::string> expected;
  };
  const auto edit = [](std::string from, std::string to) {
    return [=](DeltaBuilder& d) { d.edits.emplace_back(from, to); };
  };
  const std::vector<Bad> bads{
      {"no codec", edit("\"lossless\":{\"codec\":\"zstd\"},", ""), {"lacks 'lossless'"}},
      {"another codec", edit("\"codec\":\"zstd\"", "\"codec\":\"lzma\""), {"unknown codec 'lzma'"}},
      {"codec no string", edit("{\"codec\":\"zstd\"}", "{\"codec\":7}"), {"must be a string", "7"}},
      {"no object", edit("{\"codec\":\"zstd\"}", "true"), {"must be an object", "true"}},
      {"no dtype", edit(",\"dtype\":\"F32\"", ""), {"model.norm.weight", "lacks 'dtype'"}},
      {"odd dtype",
       edit("\"dtype\":\"F32\"", "\"dtype\":\"I64\""),
       {"model.norm.weight", "BF16, F16 or F32", "I64"}},
      {"plain version",
       edit("\"version\":2", "\"version\":1"),
       {"in the file, the manifest makes"}},
      {"a later version", edit("\"version\":2", "\"version\":3"), {"version 3", "1 and 2"}},
      {"cut",
       [](DeltaBuilder& d) { d.streams[kEmbed] = [](auto& s) { s.pop_back(); }; },
       {kEmbed, "its table makes them"}},
      {"grown",
       [](DeltaBuilder& d) { d.streams[kEmbed] = [](auto& s) { s += '\0'; }; },
       {kEmbed, "its table makes them"}},
      {"none",
       [](DeltaBuilder& d) { d.streams[kInt2] = [](auto& s) { s.clear(); }; },
       {kInt2, "too few for the table"}},
      {"damaged",
       [](DeltaBuilder& d) { d.streams[kInt2] = [](auto& s) { s[4] = 'x'; }; },
       {kInt2, "chunk 0 of 1", "zstd cannot decode"}},
      {"bad indices",
       [](DeltaBuilder& d) {
         auto& data = d.find(kInt2).data;
         data[9] = '\x55';
       },
       {kInt2, "the first must be below the second"}},
      {"not finite",
       [](DeltaBuilder& d) { d.find("model.embed_tokens.weight.scales").data[1] = '\x7C'; },
       {"model.embed_tokens.weight.scales", "not finite"}},
  };
  for (const Bad& bad : bads) {
    DeltaBuilder builder = small_delta();
    builder.packed();
    bad.spoil(builder);
    const AlignedBytes bytes(builder.str());
    const auto message = message_of<InvalidArgument>([&] { DeltaFile::parse(bytes.span(), "d"); });
    for (const std::string& part : bad.expected) {
      EXPECT_NE(message.find(part), std::string::npos) << bad.what << ": " << message;
    }
  }
}

}  // namespace
}  // namespace deltazip
