#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <string>
#include <vector>

#include "allocation_meter.h"
#include "delta/delta_builder.h"
#include "deltazip/base/error.h"
#include "deltazip/delta/packed_stream.h"
#include "deltazip/io/json_text.h"
#include "targets.h"

namespace deltazip {
namespace {

using test::AlignedBytes;
using test::small_delta;

// A short fuzzing in every run of the tests, always the same: mutants of valid files are read or
// refused, and memory follows their size.
class Mutator {
 public:
  explicit Mutator(std::uint32_t seed) : rng_(seed) {}

  std::string operator()(std::string text) {
    const std::size_t count = 1 + rng_() % 4;
    for (std::size_t i = 0; i < count; ++i) mutate(text);
    if (rng_() % 2 == 0) mend_length(text);
    return text;
  }

 private:
  std::size_t below(std::size_t bound) { return bound == 0 ? 0 : rng_() % bound; }

  void mutate(std::string& text) {
    static const std::array<std::string, 16> kWords{"0",
                                                    "-1",
                                                    "18446744073709551615",
                                                    "4294967296",
                                                    "2147483648",
                                                    "1e999",
                                                    "\"",
                                                    "\\",
                                                    "[[",
                                                    "{",
                                                    "}",
                                                    "null",
                                                    "F16",
                                                    "U8",
                                                    "\"shape\":",
                                                    std::string(1, '\0')};
    const std::size_t at = below(text.size());
    const std::size_t length = std::min(below(24), text.size() - at);
    switch (rng_() % 8) {
      case 0:
        if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      case 1:
        if (!text.empty()) text[at] = static_cast<char>(rng_() & 0xFFu);
        break;
      case 2:
        text.erase(at, length);
        break;
      case 3:
        text.insert(at, text.substr(below(text.size()), 1 + below(64)));
        break;
      case 4:
        text.insert(at, kWords[below(kWords.size())]);
        break;
      case 5:
        text.replace(at, length, kWords[below(kWords.size())]);
        break;
      case 6:
        replace_number(text, at);
        break;
      default:
        text.resize(rng_() % 16 == 0 ? at : text.size());
    }
  }

  // The next number of the header becomes another one.
  void replace_number(std::string& text, std::size_t at) {
    const std::size_t first = text.find_first_of("0123456789", at);
    if (first == std::string::npos) return;
    const std::size_t last = std::min(text.find_first_not_of("0123456789", first), text.size());
    const std::array<std::string, 6> others{"0",  "1",           "32",
                                            "64", "99999999999", std::to_string(rng_() % 256)};
    text.replace(first, last - first, others[below(others.size())]);
  }

  // After an insertion the length before the header is wrong, and nothing else would be read.
  static void mend_length(std::string& text) {
    const std::size_t end = text.rfind("}}");
    if (text.size() < 10 || end == std::string::npos || end < 8) return;
    std::size_t length = end + 2 - 8;
    text.insert(end + 2, (8 - length % 8) % 8, ' ');
    length += (8 - length % 8) % 8;
    for (std::size_t i = 0; i < 8; ++i) text[i] = static_cast<char>((length >> (8 * i)) & 0xFF);
  }

  std::mt19937 rng_;
};

// Bytes of memory a reader may take for each byte of file, and in any case. A JSON value of two
// characters is 40 bytes as a node of a tree, in a vector that has just doubled.
// A packed file's chunk is decoded whole, however few bytes it takes there.
constexpr std::size_t kBytesPerByte = 64, kBytesAnyway = (64 << 10) + 2 * kPackedChunkBytes;

template <typename Target>
std::size_t measure(const std::string& text, Target target, bool& valid) {
  const AlignedBytes bytes(text);
  test::reset_allocation_peak();
  valid = target(bytes.span());
  return test::allocation_peak();
}

template <typename Target>
void smoke(const std::vector<std::string>& seeds, int num_mutants, Target target) {
  Mutator mutator(2025);
  int num_valid = 0;
  for (int i = 0; i < num_mutants; ++i) {
    const std::string& seed = seeds[static_cast<std::size_t>(i) % seeds.size()];
    const std::string text = i < static_cast<int>(seeds.size()) ? seed : mutator(seed);
    bool valid = false;
    std::size_t peak = 0;
    ASSERT_NO_THROW(peak = measure(text, target, valid)) << "mutant " << i;
    ASSERT_LE(peak, kBytesPerByte * text.size() + kBytesAnyway) << "mutant " << i;
    if (i < static_cast<int>(seeds.size())) {
      ASSERT_TRUE(valid) << "seed " << i;
    }
    num_valid += valid;
  }
  // Neither all refused at the first byte nor nothing noticed.
  EXPECT_GT(num_valid, num_mutants / 100);
  EXPECT_LT(num_valid, num_mutants / 2);
}

std::vector<std::string> delta_seeds() {
  std::vector<std::string> seeds{small_delta().str()};
  for (const char* type : {"sparse24_int4", "sparse24_int2", "sparse24_ternary", "sparse14_sign",
                           "dense_int4", "dense_int8"}) {
    seeds.push_back(test::DeltaBuilder().matrix("w", type, 2, 33, 32).str());
  }
  seeds.push_back(test::DeltaBuilder().replaced("n", "F32", {3}).unchanged("u", {}).str());
  return seeds;
}

TEST(FuzzSmoke, Safetensors) {
  std::vector<std::string> seeds = delta_seeds();
  seeds.push_back(test::SafetensorsBuilder()
                      .add("i64", "I64", "[1]", std::string(8, 'x'))
                      .add("none", "F32", "[0,5]", "")
                      .add("f16", "F16", "[]", "ab")
                      .add("u8", "U8", "[3]", "abc")
                      .str());
  smoke(seeds, 20'000, test::try_safetensors);
}

TEST(FuzzSmoke, Delta) { smoke(delta_seeds(), 20'000, test::try_delta); }

TEST(FuzzSmoke, PackedDelta) {
  smoke({small_delta().packed().str(),
         test::DeltaBuilder().matrix("w", "sparse24_int2", 2, 33, 32).packed().str(),
         test::DeltaBuilder().replaced("n", "F32", {3}).unchanged("u", {}).packed().str()},
        10'000, test::try_delta);
}

// Mutants of a file seldom reach the decoder past its checksums of shape and size; these do.
TEST(FuzzSmoke, PackedStream) {
  std::mt19937 rng(7);
  std::string plain;
  for (int i = 0; i < 5000; ++i) plain += static_cast<char>(rng() % 5 == 0 ? rng() % 7 : 0);
  const auto codec = Codec::make("zstd");
  const auto valid = encode_stream(*codec, std::as_bytes(std::span(plain)), 2);
  int num_read = 0;
  for (int i = 0; i < 20'000; ++i) {
    auto bytes = valid;
    for (std::size_t n = 1 + rng() % 3; n > 0; --n) {
      bytes[rng() % bytes.size()] ^= static_cast<std::byte>(1u << (rng() % 8));
    }
    if (rng() % 4 == 0) bytes.resize(rng() % bytes.size());
    std::vector<std::byte> out(plain.size());
    try {
      const auto read = [&](std::size_t at, std::span<std::byte> to) {
        ASSERT_LE(at + to.size(), bytes.size());
        std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), to.size(), to.begin());
      };
      StreamDecoder(*codec, read, bytes.size(), out.size(), 2, "s: ").decode_all(out);
      ++num_read;  // the content's digest finds what this does not
    } catch (const InvalidArgument&) {
    }
  }
  EXPECT_LT(num_read, 20'000);
  EXPECT_GT(num_read, 0);
}

// Headers and manifests made to cost as much memory as a reader can be brought to spend.
TEST(FuzzSmoke, MemoryFollowsTheSizeOfTheFile) {
  constexpr int kCount = 20'000;
  std::string entries, metadata, arrays, objects;
  for (int i = 0; i < kCount; ++i) {
    const std::string comma = i == 0 ? "" : ",", number = std::to_string(i);
    entries += comma + "\"" + number + "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}";
    metadata += comma + "\"" + number + "\":\"\"";
    arrays += comma + "[]";
    objects += comma + "{\\\"a\\\":{}}";
  }
  const auto delta = [](const std::string& manifest) {
    return test::safetensors_text(
        "{\"__metadata__\":{\"format\":\"deltazip\",\"manifest\":\"" + manifest + "\"}}", "");
  };
  for (const std::string& text :
       {test::safetensors_text("{" + entries + "}", ""),
        test::safetensors_text("{\"__metadata__\":{" + metadata + "}}", ""),
        delta("{\\\"x\\\":[" + arrays + "]}"), delta("{\\\"x\\\":[" + objects + "]}")}) {
    bool valid = false;
    EXPECT_LE(measure(text, test::try_safetensors, valid), kBytesPerByte * text.size());
    EXPECT_TRUE(valid);
    EXPECT_LE(measure(text, test::try_delta, valid), kBytesPerByte * text.size());
    EXPECT_FALSE(valid);
  }
}

}  // namespace
}  // namespace deltazip
