#include "deltazip/io/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "deltazip/base/error.h"
#include "deltazip/io/json_text.h"
#include "io/mapped_file.h"
#include "io/safetensors_header.h"

namespace deltazip {
namespace {

constexpr std::array kDTypeNames{
    std::pair{DType::kFloat32, std::string_view("F32")},
    std::pair{DType::kFloat16, std::string_view("F16")},
    std::pair{DType::kBFloat16, std::string_view("BF16")},
    std::pair{DType::kInt32, std::string_view("I32")},
    std::pair{DType::kInt64, std::string_view("I64")},
    std::pair{DType::kUInt8, std::string_view("U8")},
};

constexpr std::size_t kLengthBytes = 8;  // the little-endian header length before the header
constexpr std::size_t kAlignment = 8;    // of the data section

std::uint64_t little_endian(std::span<const std::byte, kLengthBytes> bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    value |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
  }
  return value;
}

// Sorts the tensors by offset and checks that they tile [0, data_bytes) exactly.
void check_layout(std::vector<SafetensorsHeader::Tensor>& tensors, std::uint64_t data_bytes,
                  const std::string& file) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::uint64_t position = 0;
  for (const auto& tensor : tensors) {
    const auto at = [&] { return file + ": tensor '" + printable(tensor.name) + "' "; };
    DZ_CHECK(tensor.begin <= tensor.end, at(), "has data_offsets [", tensor.begin, ", ", tensor.end,
             "], which run backwards");
    DZ_CHECK(tensor.end <= data_bytes, at(), "has data_offsets [", tensor.begin, ", ", tensor.end,
             "], the file has ", data_bytes, " bytes of data");
    DZ_CHECK(tensor.begin >= position, at(), "overlaps the one before it: it begins at ",
             tensor.begin, ", that ends at ", position);
    DZ_CHECK(tensor.begin == position, at(), "leaves a hole: it begins at ", tensor.begin,
             ", the one before it ends at ", position);
    DZ_CHECK(tensor.end - tensor.begin == tensor.num_bytes, at(), "has ", tensor.end - tensor.begin,
             " bytes, ", safetensors_name(tensor.dtype), " ", tensor.shape.str(), " takes ",
             tensor.num_bytes);
    DZ_CHECK(tensor.begin % size_of(tensor.dtype) == 0, at(), "begins at byte ", tensor.begin,
             ", not a multiple of its element's ", size_of(tensor.dtype));
    position = tensor.end;
  }
  DZ_CHECK(position == data_bytes, file, ": the tensors end at byte ", position,
           " of the data, which has ", data_bytes);
}

}  // namespace

std::string_view safetensors_name(DType dtype) {
  for (const auto& [value, text] : kDTypeNames) {
    if (value == dtype) return text;
  }
  return "unknown";
}

std::optional<DType> dtype_from_safetensors_name(std::string_view name) {
  for (const auto& [value, text] : kDTypeNames) {
    if (text == name) return value;
  }
  return std::nullopt;
}

std::string digest_text(const Shape& shape) {
  std::string text;
  for (int axis = 0; axis < shape.rank(); ++axis) {
    if (axis > 0) text += ',';
    text += std::to_string(shape[axis]);
  }
  return text;
}

struct SafetensorsFile::Impl {
  std::optional<MappedFile> mapping;  // none: bytes in memory
  std::span<const std::byte> bytes;
  std::string name;
  std::vector<SafetensorsEntry> entries;  // by offset
  std::vector<std::uint32_t> by_name;     // into entries
  std::map<std::string, std::string, std::less<>> metadata;

  void read(std::size_t offset, std::span<std::byte> out) const {
    if (mapping) {
      mapping->file().read(offset, out);
    } else if (!out.empty()) {
      std::memcpy(out.data(), bytes.data() + offset, out.size());
    }
  }
  void load();
};

void SafetensorsFile::Impl::load() {
  const std::size_t file_bytes = bytes.size();
  DZ_CHECK(file_bytes >= kLengthBytes, name, ": a safetensors file begins with ", kLengthBytes,
           " bytes of header length, this one has ", file_bytes, " bytes in all");
  std::array<std::byte, kLengthBytes> length_bytes{};
  read(0, length_bytes);
  const std::uint64_t header_bytes = little_endian(length_bytes);
  DZ_CHECK(header_bytes <= kMaxHeaderBytes, name, ": the header has ", header_bytes,
           " bytes, at most ", kMaxHeaderBytes, " are read");
  DZ_CHECK(header_bytes <= file_bytes - kLengthBytes, name, ": the header has ", header_bytes,
           " bytes, the file has ", file_bytes - kLengthBytes, " after the length");
  DZ_CHECK(header_bytes % kAlignment == 0, name, ": the header has ", header_bytes,
           " bytes, not a multiple of ", kAlignment, ", so no tensor is aligned");

  std::string json(header_bytes, '\0');
  read(kLengthBytes, std::as_writable_bytes(std::span(json)));
  SafetensorsHeader header = parse_safetensors_header(json, name);
  const std::size_t data_begin = kLengthBytes + header_bytes;
  check_layout(header.tensors, file_bytes - data_begin, name);

  entries.reserve(header.tensors.size());
  by_name.reserve(header.tensors.size());
  for (auto& tensor : header.tensors) {
    by_name.push_back(static_cast<std::uint32_t>(entries.size()));
    const ConstTensorView view{bytes.data() + data_begin + tensor.begin, tensor.dtype,
                               tensor.shape};
    entries.push_back({std::move(tensor.name), view});
  }
  std::sort(by_name.begin(), by_name.end(),
            [&](std::uint32_t a, std::uint32_t b) { return entries[a].name < entries[b].name; });
  metadata = std::move(header.metadata);
}

SafetensorsFile::SafetensorsFile() : impl_(std::make_unique<Impl>()) {}
SafetensorsFile::~SafetensorsFile() = default;

std::shared_ptr<const SafetensorsFile> SafetensorsFile::open(const std::filesystem::path& path) {
  std::shared_ptr<SafetensorsFile> file(new SafetensorsFile);
  file->impl_->name = path.string();
  file->impl_->mapping.emplace(path);
  file->impl_->bytes = file->impl_->mapping->bytes();
  file->impl_->load();
  return file;
}

std::shared_ptr<const SafetensorsFile> SafetensorsFile::parse(std::span<const std::byte> bytes,
                                                              std::string name) {
  DZ_CHECK(reinterpret_cast<std::uintptr_t>(bytes.data()) % kAlignment == 0, name,
           ": the bytes in memory must be ", kAlignment, "-byte aligned");
  std::shared_ptr<SafetensorsFile> file(new SafetensorsFile);
  file->impl_->name = std::move(name);
  file->impl_->bytes = bytes;
  file->impl_->load();
  return file;
}

const std::vector<SafetensorsEntry>& SafetensorsFile::entries() const { return impl_->entries; }

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto& entries = impl_->entries;
  const auto found = std::lower_bound(
      impl_->by_name.begin(), impl_->by_name.end(), name,
      [&](std::uint32_t index, std::string_view wanted) { return entries[index].name < wanted; });
  if (found == impl_->by_name.end() || entries[*found].name != name) return nullptr;
  return &entries[*found];
}

const std::map<std::string, std::string, std::less<>>& SafetensorsFile::metadata() const {
  return impl_->metadata;
}

std::size_t SafetensorsFile::num_bytes() const { return impl_->bytes.size(); }

const std::string& SafetensorsFile::name() const { return impl_->name; }

void SafetensorsFile::read(const SafetensorsEntry& entry, std::size_t offset,
                           std::span<std::byte> out) const {
  const std::span<const std::byte> all = entry.bytes();
  DZ_INTERNAL(all.data() >= impl_->bytes.data() && offset <= all.size() &&
                  out.size() <= all.size() - offset &&
                  all.data() + all.size() <= impl_->bytes.data() + impl_->bytes.size(),
              "a read of ", out.size(), " bytes at ", offset, " of '", entry.name, "'");
  impl_->read(static_cast<std::size_t>(all.data() - impl_->bytes.data()) + offset, out);
}

void SafetensorsFile::stream(
    const SafetensorsEntry& entry,
    const std::function<void(std::size_t, std::span<const std::byte>)>& piece) const {
  constexpr std::size_t kPieceBytes = 1u << 20;  // stays in L2 from read to use
  const std::size_t total = entry.view.num_bytes();
  const std::size_t capacity = std::min(total, kPieceBytes);
  const auto buffer = std::make_unique_for_overwrite<std::byte[]>(capacity);
  for (std::size_t offset = 0; offset < total; offset += capacity) {
    const std::span<std::byte> out(buffer.get(), std::min(capacity, total - offset));
    read(entry, offset, out);
    piece(offset, out);
  }
}

Digest SafetensorsFile::digest(const SafetensorsEntry& entry) const {
  Sha256 hash;
  stream(entry, [&](std::size_t, std::span<const std::byte> bytes) { hash.update(bytes); });
  return hash.finish();
}

void SafetensorsFile::check_unchanged() const {
  if (impl_->mapping) impl_->mapping->file().check_unchanged();
}

}  // namespace deltazip
