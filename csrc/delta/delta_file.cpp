#include "deltazip/delta/delta_file.h"

#include <algorithm>
#include <map>
#include <utility>

#include "delta/content_check.h"
#include "delta/manifest.h"
#include "delta/stored_bytes.h"
#include "deltazip/base/error.h"
#include "deltazip/io/json_text.h"

namespace deltazip {
namespace {

constexpr const char* kFileName = "delta.safetensors";
constexpr std::string_view kNul("\0", 1);

using Role = StoredTensor::Role;

void set_bytes(DeltaTensor& tensor, Role role, std::span<const std::byte> bytes) {
  switch (role) {
    case Role::kReplaced:
      tensor.replaced.data = bytes.data();
      break;
    case Role::kValues:
      tensor.matrix.values = bytes;
      break;
    case Role::kIndices:
      tensor.matrix.indices = bytes;
      break;
    case Role::kScales:
      tensor.matrix.scales = bytes;
      break;
  }
}

DeltaTensor resolve(const StoredBytes& bytes, const Manifest::Tensor& tensor) {
  DeltaTensor out;
  out.name = tensor.name;
  out.kind = tensor.kind;
  out.shape = tensor.shape;
  if (tensor.kind == DeltaKind::kMatrix) {
    out.matrix.type = tensor.type;
    out.matrix.rows = tensor.shape[0];
    out.matrix.columns = tensor.shape[1];
    out.matrix.group_size = tensor.group_size;
  }
  for (const StoredTensor& stored : stored_tensors(tensor)) {
    const StoredBytes::Tensor& found = bytes.at(stored.name);
    set_bytes(out, stored.role, bytes.mapped(found));
    if (stored.role == Role::kReplaced) {
      out.replaced.dtype = found.dtype;
      out.replaced.shape = found.shape;
    }
  }
  return out;
}

// Where in the tensor `element` is, for a message.
std::string place(const Shape& shape, std::size_t element) {
  if (shape.rank() != 2) return "element " + std::to_string(element);
  const auto columns = static_cast<std::size_t>(shape[1]);
  return "row " + std::to_string(element / columns) + ", column " +
         std::to_string(element % columns);
}

void check_piece(const std::string& file, const StoredBytes::Tensor& tensor, std::size_t offset,
                 std::span<const std::byte> bytes) {
  if (tensor.role == Role::kValues) return;  // every code has a meaning
  const auto bad = tensor.role == Role::kIndices ? first_bad_indices(bytes)
                                                 : first_not_finite(bytes, tensor.dtype);
  if (!bad) return;
  const std::string at = file + ": tensor '" + printable(tensor.entry->name) + "' has ";
  const std::string where = place(tensor.shape, offset / size_of(tensor.dtype) + *bad);
  DZ_CHECK(tensor.role != Role::kIndices, at, "indices ", std::to_integer<int>(bytes[*bad]), " at ",
           where, ": in each half the first must be below the second");
  detail::fail<InvalidArgument>(at, "a value that is not finite at ", where);
}

// Reads every stored byte once: ranges and digest. docs/delta_format.md, "Digests".
Digest check_content(const StoredBytes& bytes, const Manifest& manifest) {
  Sha256 content;
  content.update("deltazip.delta.v1").update(kNul).update(manifest.base_digest.hex()).update(kNul);
  for (const Manifest::Tensor& tensor : manifest.tensors) {
    content.update(tensor.name).update(kNul).update(tensor.type_name()).update(kNul);
    content.update(digest_text(tensor.shape)).update(kNul);
    content.update(std::to_string(tensor.group_size)).update(kNul);
  }
  for (const auto& [name, tensor] : bytes.tensors()) {
    Sha256 hash;
    bytes.stream(tensor,
                 [&, &stored = tensor](std::size_t offset, std::span<const std::byte> piece) {
                   check_piece(bytes.file().name(), stored, offset, piece);
                   hash.update(piece);
                 });
    const Digest digest = hash.finish();
    content.update(name).update(kNul);
    content.update(safetensors_name(tensor.dtype)).update(kNul);
    content.update(std::as_bytes(std::span(digest.bytes)));
  }
  return content.finish();
}

const std::string& metadata_value(const SafetensorsFile& file, const char* key) {
  const auto found = file.metadata().find(key);
  DZ_CHECK(found != file.metadata().end(), file.name(), " is not a delta: __metadata__ lacks '",
           key, "'");
  return found->second;
}

Manifest read_manifest(const SafetensorsFile& file) {
  const std::string& format = metadata_value(file, "format");
  DZ_CHECK(format == "deltazip", file.name(), " is not a delta: its format is '",
           printable(format, 60), "', expected 'deltazip'");
  return parse_manifest(metadata_value(file, "manifest"), file.name());
}

}  // namespace

struct DeltaFile::Impl {
  std::shared_ptr<const SafetensorsFile> file;
  const Manifest manifest;
  const StoredBytes bytes;
  std::vector<DeltaTensor> tensors;

  explicit Impl(std::shared_ptr<const SafetensorsFile> opened);
};

DeltaFile::Impl::Impl(std::shared_ptr<const SafetensorsFile> opened)
    : file(std::move(opened)), manifest(read_manifest(*file)), bytes(file, manifest) {
  tensors.reserve(manifest.tensors.size());
  for (const Manifest::Tensor& tensor : manifest.tensors) {
    tensors.push_back(resolve(bytes, tensor));
  }
  const Digest found = check_content(bytes, manifest);
  DZ_CHECK(found == manifest.content_digest, file->name(), ": the content's digest is ",
           found.hex(), ", the manifest says ", manifest.content_digest.hex());
}

DeltaFile::DeltaFile() = default;

std::shared_ptr<const DeltaFile> DeltaFile::open(const std::filesystem::path& folder_or_file) {
  std::error_code ignored;
  const bool is_folder = std::filesystem::is_directory(folder_or_file, ignored);
  std::shared_ptr<DeltaFile> delta(new DeltaFile);
  delta->impl_ = std::make_shared<Impl>(
      SafetensorsFile::open(is_folder ? folder_or_file / kFileName : folder_or_file));
  return delta;
}

std::shared_ptr<const DeltaFile> DeltaFile::parse(std::span<const std::byte> bytes,
                                                  std::string name) {
  std::shared_ptr<DeltaFile> delta(new DeltaFile);
  delta->impl_ = std::make_shared<Impl>(SafetensorsFile::parse(bytes, std::move(name)));
  return delta;
}

const std::vector<DeltaTensor>& DeltaFile::tensors() const { return impl_->tensors; }

const DeltaTensor* DeltaFile::find(std::string_view name) const {
  const auto found = std::lower_bound(
      impl_->tensors.begin(), impl_->tensors.end(), name,
      [](const DeltaTensor& tensor, std::string_view key) { return tensor.name < key; });
  return found != impl_->tensors.end() && found->name == name ? &*found : nullptr;
}

const Digest& DeltaFile::base_digest() const { return impl_->manifest.base_digest; }
const Digest& DeltaFile::content_digest() const { return impl_->manifest.content_digest; }
const std::string& DeltaFile::manifest_json() const {
  return impl_->file->metadata().find("manifest")->second;
}
std::size_t DeltaFile::num_bytes() const { return impl_->file->num_bytes(); }
const std::string& DeltaFile::name() const { return impl_->file->name(); }

DeltaTensor DeltaFile::load(const DeltaTensor& tensor, std::vector<std::byte>& storage) const {
  constexpr std::size_t kAlignment = 64;
  const auto found = std::lower_bound(
      impl_->manifest.tensors.begin(), impl_->manifest.tensors.end(), tensor.name,
      [](const Manifest::Tensor& row, const std::string& name) { return row.name < name; });
  DZ_INTERNAL(found != impl_->manifest.tensors.end() && found->name == tensor.name, tensor.name);
  const std::vector<StoredTensor> stored = stored_tensors(*found);
  std::vector<std::size_t> offsets;
  std::size_t num_bytes = 0;
  for (const StoredTensor& part : stored) {
    offsets.push_back(num_bytes);
    const std::size_t size = impl_->bytes.at(part.name).num_bytes();
    num_bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
  }
  if (storage.size() < num_bytes) storage.resize(num_bytes);

  DeltaTensor out = tensor;
  for (std::size_t i = 0; i < stored.size(); ++i) {
    const StoredBytes::Tensor& part = impl_->bytes.at(stored[i].name);
    const std::span<std::byte> to = std::span(storage).subspan(offsets[i], part.num_bytes());
    impl_->bytes.read(part, to);
    set_bytes(out, stored[i].role, to);
  }
  return out;
}

void DeltaFile::check_unchanged() const { impl_->file->check_unchanged(); }

void check_matches_base(const DeltaFile& file, const Digest& base_digest,
                        const std::vector<BaseTensor>& base_tensors) {
  // Tensors before the digest: a message that names one tells more than two hashes do.
  std::map<std::string_view, const Shape*> base;
  for (const BaseTensor& tensor : base_tensors) base.emplace(tensor.name, &tensor.shape);
  for (const DeltaTensor& tensor : file.tensors()) {
    const auto found = base.find(tensor.name);
    DZ_CHECK(found != base.end(), file.name(), ": tensor '", printable(tensor.name), "' ",
             tensor.shape.str(), " is not a tensor of the base");
    DZ_CHECK(tensor.shape == *found->second, file.name(), ": tensor '", printable(tensor.name),
             "' is ", tensor.shape.str(), " in the delta, the base has ", found->second->str());
  }
  for (const auto& [name, shape] : base) {
    DZ_CHECK(file.find(name) != nullptr, file.name(), ": the base's tensor '", printable(name),
             "' ", shape->str(), " is missing");
  }
  DZ_CHECK(file.base_digest() == base_digest, file.name(), " was made from another base: digest ",
           file.base_digest().hex(), ", this base has ", base_digest.hex());
}

}  // namespace deltazip
