#include <zstd.h>

#include <string>

#include "deltazip/base/error.h"
#include "deltazip/delta/codec.h"
#include "deltazip/io/json_text.h"

namespace deltazip {
namespace {

struct FreeContext {
  void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

class ZstdCodec : public Codec {
 public:
  std::vector<std::byte> encode(std::span<const std::byte> plain) override {
    // Codes look like noise: what zstd gains is its Huffman coder, as good at level 1 as at any.
    // Only where that halves them are there runs of equal ones that a search finds.
    constexpr int kQuick = 1, kThorough = 16;
    std::vector<std::byte> best = encode_at(plain, kQuick);
    if (best.size() < plain.size() / 2) {
      std::vector<std::byte> other = encode_at(plain, kThorough);
      if (other.size() < best.size()) best = std::move(other);
    }
    return best;
  }

  void decode(std::span<const std::byte> encoded, std::span<std::byte> plain) override {
    if (!decoder_) decoder_.reset(ZSTD_createDCtx());
    if (!decoder_) throw std::bad_alloc();
    const std::size_t got = ZSTD_decompressDCtx(decoder_.get(), plain.data(), plain.size(),
                                                encoded.data(), encoded.size());
    DZ_CHECK(!ZSTD_isError(got), "zstd cannot decode ", encoded.size(), " bytes to ", plain.size(),
             ": ", ZSTD_getErrorName(got));
    DZ_CHECK(got == plain.size(), "zstd decoded ", encoded.size(), " bytes to ", got, ", expected ",
             plain.size());
  }

 private:
  std::vector<std::byte> encode_at(std::span<const std::byte> plain, int level) {
    if (!encoder_) encoder_.reset(ZSTD_createCCtx());
    if (!encoder_) throw std::bad_alloc();
    std::vector<std::byte> encoded(ZSTD_compressBound(plain.size()));
    const std::size_t size = ZSTD_compressCCtx(encoder_.get(), encoded.data(), encoded.size(),
                                               plain.data(), plain.size(), level);
    DZ_INTERNAL(!ZSTD_isError(size), "zstd: ", ZSTD_getErrorName(size));
    encoded.resize(size);
    return encoded;
  }

  std::unique_ptr<ZSTD_CCtx, FreeContext> encoder_;  // made when first needed
  std::unique_ptr<ZSTD_DCtx, FreeContext> decoder_;
};

}  // namespace

std::unique_ptr<Codec> Codec::make(std::string_view name) {
  DZ_CHECK(name == "zstd", "unknown codec '", printable(name, 60), "', this version knows zstd");
  return std::make_unique<ZstdCodec>();
}

}  // namespace deltazip
