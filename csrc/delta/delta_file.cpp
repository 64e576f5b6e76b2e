#include "deltazip/delta/delta_file.h"

#include <algorithm>
#include <map>
#include <utility>

#include "delta/content_check.h"
#include "delta/manifest.h"
#include "deltazip/base/error.h"
#include "deltazip/io/json_text.h"

namespace deltazip {
namespace {

constexpr const char* kFileName = "delta.safetensors";
constexpr std::string_view kNul("\0", 1);

using Role = StoredTensor::Role;

// One tensor of the safetensors file and what the manifest takes it for.
struct Claim {
  const SafetensorsEntry* entry = nullptr;
  Role role = Role::kReplaced;
};
using Claims = std::map<std::string, Claim, std::less<>>;  // by stored name

bool has_expected_dtype(Role role, DType dtype) {
  if (role == Role::kReplaced) return is_floating(dtype);
  return dtype == (role == Role::kScales ? DType::kFloat16 : DType::kUInt8);
}

const char* expected_dtype(Role role) {
  return role == Role::kReplaced ? "BF16, F16 or F32" : role == Role::kScales ? "F16" : "U8";
}

const SafetensorsEntry& claim(Claims& claims, const SafetensorsFile& file,
                              const StoredTensor& stored) {
  const std::string at = file.name() + ": tensor '" + printable(stored.name) + "' ";
  const SafetensorsEntry* entry = file.find(stored.name);
  DZ_CHECK(entry != nullptr, at, "is missing, the manifest asks for ", expected_dtype(stored.role),
           " ", stored.shape.str());
  DZ_CHECK(has_expected_dtype(stored.role, entry->view.dtype), at, "is ",
           safetensors_name(entry->view.dtype), ", expected ", expected_dtype(stored.role));
  DZ_CHECK(entry->view.shape == stored.shape, at, "is ", entry->view.shape.str(),
           " in the file, the manifest makes it ", stored.shape.str());
  const bool is_new = claims.emplace(stored.name, Claim{entry, stored.role}).second;
  DZ_CHECK(is_new, at, "belongs to two tensors of the manifest");
  return *entry;
}

DeltaTensor resolve(Claims& claims, const SafetensorsFile& file, const Manifest::Tensor& tensor) {
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
    const SafetensorsEntry& entry = claim(claims, file, stored);
    switch (stored.role) {
      case Role::kReplaced:
        out.replaced = entry.view;
        break;
      case Role::kValues:
        out.matrix.values = entry.bytes();
        break;
      case Role::kIndices:
        out.matrix.indices = entry.bytes();
        break;
      case Role::kScales:
        out.matrix.scales = entry.bytes();
        break;
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

void check_piece(const SafetensorsFile& file, const Claim& claimed, std::size_t offset,
                 std::span<const std::byte> bytes) {
  if (claimed.role == Role::kValues) return;  // every code has a meaning
  const ConstTensorView& view = claimed.entry->view;
  const auto bad = claimed.role == Role::kIndices ? first_bad_indices(bytes)
                                                  : first_not_finite(bytes, view.dtype);
  if (!bad) return;
  const std::string at = file.name() + ": tensor '" + printable(claimed.entry->name) + "' has ";
  const std::string where = place(view.shape, offset / size_of(view.dtype) + *bad);
  DZ_CHECK(claimed.role != Role::kIndices, at, "indices ", std::to_integer<int>(bytes[*bad]),
           " at ", where, ": in each half the first must be below the second");
  detail::fail<InvalidArgument>(at, "a value that is not finite at ", where);
}

// Reads every stored byte once: ranges and digest. docs/delta_format.md, "Digests".
Digest check_content(const SafetensorsFile& file, const Manifest& manifest, const Claims& claims) {
  Sha256 content;
  content.update("deltazip.delta.v1").update(kNul).update(manifest.base_digest.hex()).update(kNul);
  for (const Manifest::Tensor& tensor : manifest.tensors) {
    content.update(tensor.name).update(kNul).update(tensor.type_name()).update(kNul);
    content.update(digest_text(tensor.shape)).update(kNul);
    content.update(std::to_string(tensor.group_size)).update(kNul);
  }
  for (const auto& item : claims) {
    const Claim& claimed = item.second;
    Sha256 hash;
    file.stream(*claimed.entry, [&](std::size_t offset, std::span<const std::byte> bytes) {
      check_piece(file, claimed, offset, bytes);
      hash.update(bytes);
    });
    const Digest digest = hash.finish();
    content.update(item.first).update(kNul);
    content.update(safetensors_name(claimed.entry->view.dtype)).update(kNul);
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

}  // namespace

struct DeltaFile::Impl {
  std::shared_ptr<const SafetensorsFile> file;
  std::vector<DeltaTensor> tensors;
  Digest base_digest, content_digest;

  explicit Impl(std::shared_ptr<const SafetensorsFile> opened);
};

DeltaFile::Impl::Impl(std::shared_ptr<const SafetensorsFile> opened) : file(std::move(opened)) {
  const std::string& format = metadata_value(*file, "format");
  DZ_CHECK(format == "deltazip", file->name(), " is not a delta: its format is '",
           printable(format, 60), "', expected 'deltazip'");
  const Manifest manifest = parse_manifest(metadata_value(*file, "manifest"), file->name());
  base_digest = manifest.base_digest;
  content_digest = manifest.content_digest;

  Claims claims;
  tensors.reserve(manifest.tensors.size());
  for (const Manifest::Tensor& tensor : manifest.tensors) {
    tensors.push_back(resolve(claims, *file, tensor));
  }
  for (const SafetensorsEntry& entry : file->entries()) {
    DZ_CHECK(claims.contains(entry.name), file->name(), ": tensor '", printable(entry.name), "' ",
             entry.view.shape.str(), " is in the file, the manifest does not ask for it");
  }
  const Digest found = check_content(*file, manifest, claims);
  DZ_CHECK(found == content_digest, file->name(), ": the content's digest is ", found.hex(),
           ", the manifest says ", content_digest.hex());
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

const Digest& DeltaFile::base_digest() const { return impl_->base_digest; }
const Digest& DeltaFile::content_digest() const { return impl_->content_digest; }
const std::string& DeltaFile::manifest_json() const {
  return impl_->file->metadata().find("manifest")->second;
}
std::size_t DeltaFile::num_bytes() const { return impl_->file->num_bytes(); }
const std::string& DeltaFile::name() const { return impl_->file->name(); }

DeltaTensor DeltaFile::load(const DeltaTensor& tensor, std::vector<std::byte>& storage) const {
  constexpr std::size_t kAlignment = 64;
  std::size_t num_bytes = 0;
  const auto reserve = [&](std::size_t size) {
    const std::size_t offset = num_bytes;
    num_bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  };
  DeltaTensor out = tensor;
  const std::size_t values = reserve(tensor.matrix.values.size());
  const std::size_t indices = reserve(tensor.matrix.indices.size());
  const std::size_t scales = reserve(tensor.matrix.scales.size());
  const std::size_t replaced =
      reserve(tensor.kind == DeltaKind::kReplaced ? tensor.replaced.num_bytes() : 0);
  if (storage.size() < num_bytes) storage.resize(num_bytes);

  const auto copy = [&](std::string_view suffix, std::size_t offset, std::size_t size) {
    const SafetensorsEntry* entry = impl_->file->find(tensor.name + std::string(suffix));
    DZ_INTERNAL(entry != nullptr, tensor.name, suffix);
    const std::span<std::byte> to = std::span(storage).subspan(offset, size);
    impl_->file->read(*entry, 0, to);
    return std::span<const std::byte>(to);
  };
  if (tensor.kind == DeltaKind::kReplaced) {
    out.replaced.data = copy("", replaced, tensor.replaced.num_bytes()).data();
  } else if (tensor.kind == DeltaKind::kMatrix) {
    const bool is_ternary = tensor.matrix.type == DeltaType::kSparse24Ternary;
    out.matrix.values =
        copy(is_ternary ? ".codes" : ".values", values, tensor.matrix.values.size());
    if (!tensor.matrix.indices.empty()) {
      out.matrix.indices = copy(".indices", indices, tensor.matrix.indices.size());
    }
    out.matrix.scales = copy(".scales", scales, tensor.matrix.scales.size());
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
