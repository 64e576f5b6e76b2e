#include "deltazip/base/digest.h"

#include <gtest/gtest.h>

#include <set>
#include <unordered_set>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

Digest of(std::string_view text) { return Sha256().update(text).finish(); }

// NIST's examples (FIPS 180-2, appendix B) and the empty message.
TEST(DigestTest, KnownVectors) {
  EXPECT_EQ(of("").hex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(of("abc").hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq").hex(),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(of(std::string(1000000, 'a')).hex(),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(DigestTest, PiecesMakeTheWhole) {
  const std::string text(1000, 'x');
  for (const std::size_t cut : {0u, 1u, 63u, 64u, 65u, 999u}) {
    EXPECT_EQ(Sha256().update(text.substr(0, cut)).update(text.substr(cut)).finish(), of(text));
  }
  Sha256 hash;
  hash.update("first");
  hash.finish();
  EXPECT_EQ(hash.update("abc").finish(), of("abc")) << "finish() starts anew";
  EXPECT_EQ(sha256(std::as_bytes(std::span(text))), of(text));
}

TEST(DigestTest, HexComesBackAndIsChecked) {
  const Digest digest = of("abc");
  EXPECT_EQ(Digest::from_hex(digest.hex()), digest);
  EXPECT_THROW(Digest::from_hex("ab"), InvalidArgument);
  EXPECT_THROW(Digest::from_hex(std::string(64, 'g')), InvalidArgument);
  EXPECT_THROW(Digest::from_hex(std::string(64, 'A')), InvalidArgument);
  EXPECT_THROW(Digest::from_hex(digest.hex() + "0"), InvalidArgument);
}

TEST(DigestTest, OrdersAndHashes) {
  std::set<Digest> ordered;
  std::unordered_set<Digest> hashed;
  for (int i = 0; i < 100; ++i) {
    ordered.insert(of(std::to_string(i % 50)));
    hashed.insert(of(std::to_string(i % 50)));
  }
  EXPECT_EQ(ordered.size(), 50u);
  EXPECT_EQ(hashed.size(), 50u);
}

}  // namespace
}  // namespace deltazip
