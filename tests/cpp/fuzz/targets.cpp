#include "targets.h"

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "deltazip/base/error.h"
#include "deltazip/delta/delta_file.h"
#include "deltazip/delta/delta_store.h"
#include "deltazip/delta/dequantize.h"
#include "deltazip/io/safetensors.h"

namespace deltazip::test {
namespace {

// Exactly as long as the input, so that a sanitizer sees one byte too many; aligned as malloc does.
class Copy {
 public:
  explicit Copy(std::span<const std::byte> bytes)
      : data_(std::make_unique_for_overwrite<std::byte[]>(bytes.size())), size_(bytes.size()) {
    if (!bytes.empty()) std::memcpy(data_.get(), bytes.data(), bytes.size());
  }
  std::span<std::byte> span() { return {data_.get(), size_}; }

 private:
  std::unique_ptr<std::byte[]> data_;
  std::size_t size_;
};

// Something that depends on every byte, so that none of the reading can be left out.
volatile std::uint64_t sink = 0;
void use(std::span<const std::byte> bytes) {
  std::uint64_t sum = 0;
  for (const std::byte byte : bytes) sum = 31 * sum + std::to_integer<std::uint64_t>(byte);
  sink = sink + sum;
}

void use(const DeltaFile& file) {
  std::vector<std::byte> storage;
  for (const DeltaTensor& tensor : file.tensors()) {
    DZ_INTERNAL(file.find(tensor.name) == &tensor, tensor.name);
    sink = sink + static_cast<std::uint64_t>(layer_of(tensor.name));
    const DeltaTensor copy = file.load(tensor, storage);
    if (tensor.kind == DeltaKind::kReplaced) {
      use({static_cast<const std::byte*>(copy.replaced.data), copy.replaced.num_bytes()});
    }
    if (tensor.kind != DeltaKind::kMatrix) continue;
    std::vector<float> row(static_cast<std::size_t>(copy.matrix.columns));
    for (std::int64_t r = 0; r < copy.matrix.rows; ++r) {
      dequantize_row(copy.matrix, r, row);
      use(std::as_bytes(std::span(row)));
    }
  }
}

// The digest that the message of a mismatch says the content has; "" for any other message.
std::string found_digest(const std::string& message) {
  constexpr std::string_view kBefore = "the content's digest is ";
  const std::size_t at = message.find(kBefore);
  return at == std::string::npos ? "" : message.substr(at + kBefore.size(), 64);
}

bool parse_delta(std::span<std::byte> bytes, bool may_mend) {
  try {
    use(*DeltaFile::parse(bytes, "fuzz"));
    return true;
  } catch (const InvalidArgument& error) {
    const std::string digest = found_digest(error.what());
    if (digest.empty() || !may_mend) return false;
    constexpr std::string_view kSays = "the manifest says ";
    const std::string message = error.what();
    const std::string wrong = message.substr(message.find(kSays) + kSays.size(), 64);
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    const std::size_t at = text.find(wrong);
    if (at == std::string_view::npos) return false;  // spelt with escapes
    std::memcpy(bytes.data() + at, digest.data(), digest.size());
  }
  return parse_delta(bytes, false);
}

}  // namespace

bool try_safetensors(std::span<const std::byte> bytes) {
  Copy copy(bytes);
  try {
    const auto file = SafetensorsFile::parse(copy.span(), "fuzz");
    for (const SafetensorsEntry& entry : file->entries()) {
      DZ_INTERNAL(file->find(entry.name) == &entry, entry.name);
      use(entry.bytes());
      const Digest digest = file->digest(entry);
      use(std::as_bytes(std::span(digest.bytes)));
    }
    return true;
  } catch (const InvalidArgument&) {
    return false;
  }
}

bool try_delta(std::span<const std::byte> bytes) {
  Copy copy(bytes);
  return parse_delta(copy.span(), true);
}

}  // namespace deltazip::test
