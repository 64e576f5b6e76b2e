#include "delta/manifest.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "deltazip/base/error.h"
#include "deltazip/delta/codec.h"
#include "deltazip/io/json_text.h"

namespace deltazip {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMaxManifestBytes = 32u << 20;
constexpr int kPlainVersion = 1, kPackedVersion = 2;

// The value of a key that must be there; `at` begins the message.
const Json& require(const Json& object, const char* key, const std::string& at) {
  const auto found = object.find(key);
  DZ_CHECK(found != object.end(), at, "lacks '", key, "'");
  return *found;
}

std::string shown(const Json& value) { return printable(value.dump(), 60); }

Digest read_digest(const Json& manifest, const char* key, const std::string& at) {
  const Json& value = require(manifest, key, at);
  DZ_CHECK(value.is_string(), at, "'", key, "' must be 64 hexadecimal characters, got ",
           shown(value));
  try {
    return Digest::from_hex(value.get_ref<const std::string&>());
  } catch (const InvalidArgument& error) {
    detail::fail<InvalidArgument>(at, "'", key, "': ", printable(error.what()));
  }
}

Shape read_shape(const Json& value, const std::string& at) {
  DZ_CHECK(value.is_array() && value.size() <= kMaxRank, at, "'shape' must be an array of at most ",
           kMaxRank, " sizes, got ", shown(value));
  std::array<std::int64_t, kMaxRank> dims{};
  std::int64_t num_elements = 1;
  for (std::size_t axis = 0; axis < value.size(); ++axis) {
    const Json& dim = value[axis];
    DZ_CHECK(dim.is_number_unsigned() &&
                 dim.get<std::uint64_t>() <= std::numeric_limits<std::int32_t>::max(),
             at, "'shape' has ", shown(dim), ", expected an integer from 0 to 2^31 - 1");
    dims[axis] = dim.get<std::int64_t>();
    DZ_CHECK(!__builtin_mul_overflow(num_elements, dims[axis], &num_elements), at, "'shape' ",
             shown(value), " has more than 2^63 elements");
  }
  return Shape(std::span<const std::int64_t>(dims.data(), value.size()));
}

DType read_packed_dtype(const Json& entry, const std::string& at) {
  const Json& value = require(entry, "dtype", at);
  const auto dtype = value.is_string()
                         ? dtype_from_safetensors_name(value.get_ref<const std::string&>())
                         : std::nullopt;
  DZ_CHECK(dtype && is_floating(*dtype), at, "'dtype' must be BF16, F16 or F32, got ",
           shown(value));
  return *dtype;
}

std::string read_codec(const Json& manifest, const std::string& at) {
  const Json& lossless = require(manifest, "lossless", at);
  DZ_CHECK(lossless.is_object(), at, "'lossless' must be an object, got ", shown(lossless));
  const Json& codec = require(lossless, "codec", at + "'lossless' ");
  DZ_CHECK(codec.is_string(), at, "'codec' must be a string, got ", shown(codec));
  try {
    Codec::make(codec.get_ref<const std::string&>());
  } catch (const InvalidArgument& error) {
    detail::fail<InvalidArgument>(at, error.what());
  }
  return codec.get<std::string>();
}

Manifest::Tensor read_tensor(const std::string& name, const Json& entry, bool is_packed,
                             const std::string& file) {
  const std::string at = file + ": tensor '" + printable(name) + "': ";
  DZ_CHECK(!name.empty(), file, ": the manifest has a tensor with an empty name");
  DZ_CHECK(entry.is_object(), at, "must be an object, got ", shown(entry));
  Manifest::Tensor tensor;
  tensor.name = name;
  tensor.shape = read_shape(require(entry, "shape", at), at);

  const Json& type = require(entry, "type", at);
  DZ_CHECK(type.is_string(), at, "'type' must be a string, got ", shown(type));
  const auto& type_text = type.get_ref<const std::string&>();
  if (type_text == "unchanged" || type_text == "replaced") {
    tensor.kind = type_text == "replaced" ? DeltaKind::kReplaced : DeltaKind::kUnchanged;
    if (is_packed && tensor.kind == DeltaKind::kReplaced) {
      tensor.packed_dtype = read_packed_dtype(entry, at);
    }
    return tensor;
  }
  const auto delta_type = delta_type_from_name(type_text);
  DZ_CHECK(delta_type.has_value(), at, "unknown type '", printable(type_text, 60),
           "', this version reads unchanged, replaced, sparse24_int4, sparse24_int2, "
           "sparse24_ternary, sparse14_sign, dense_int4 and dense_int8");
  tensor.kind = DeltaKind::kMatrix;
  tensor.type = *delta_type;
  DZ_CHECK(tensor.shape.rank() == 2 && tensor.shape[0] > 0 && tensor.shape[1] > 0, at, type_text,
           " needs a matrix that is not empty, got shape ", tensor.shape.str());
  const Json& group = require(entry, "group_size", at);
  DZ_CHECK(group.is_number_unsigned() && group.get<std::uint64_t>() > 0 &&
               group.get<std::uint64_t>() % kDeltaBlockColumns == 0 &&
               group.get<std::uint64_t>() <= std::numeric_limits<std::int32_t>::max(),
           at, "'group_size' must be a positive multiple of ", kDeltaBlockColumns, ", got ",
           shown(group));
  tensor.group_size = group.get<std::int32_t>();
  return tensor;
}

}  // namespace

std::string_view Manifest::Tensor::type_name() const {
  switch (kind) {
    case DeltaKind::kUnchanged:
      return "unchanged";
    case DeltaKind::kReplaced:
      return "replaced";
    case DeltaKind::kMatrix:
      return deltazip::name(type);
  }
  return "";
}

Manifest parse_manifest(std::string_view json, const std::string& file_name) {
  const std::string at = file_name + ": the manifest: ";
  DZ_CHECK(json.size() <= kMaxManifestBytes, at, "has ", json.size(), " bytes, at most ",
           kMaxManifestBytes, " are read");
  check_json_object(json, file_name + ": the manifest");
  const Json root = Json::parse(json);

  const Json& version = require(root, "version", at);
  DZ_CHECK(version.is_number_integer() && (version == kPlainVersion || version == kPackedVersion),
           at, "has version ", shown(version), ", this program reads versions ", kPlainVersion,
           " and ", kPackedVersion);
  const bool is_packed = version == kPackedVersion;
  Manifest manifest;
  if (is_packed) manifest.codec = read_codec(root, at);
  manifest.base_digest = read_digest(root, "base_digest", at);
  manifest.content_digest = read_digest(root, "content_digest", at);
  const Json& tensors = require(root, "tensors", at);
  DZ_CHECK(tensors.is_object(), at, "'tensors' must be an object, got ", shown(tensors));
  manifest.tensors.reserve(tensors.size());
  for (const auto& [name, entry] : tensors.items()) {
    manifest.tensors.push_back(read_tensor(name, entry, is_packed, file_name));
  }
  std::sort(manifest.tensors.begin(), manifest.tensors.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  return manifest;
}

std::vector<StoredTensor> stored_tensors(const Manifest::Tensor& tensor) {
  using Role = StoredTensor::Role;
  if (tensor.kind == DeltaKind::kUnchanged) return {};
  if (tensor.kind == DeltaKind::kReplaced) return {{Role::kReplaced, tensor.name, tensor.shape}};
  const std::int64_t rows = tensor.shape[0], columns = tensor.shape[1];
  const std::int64_t num_blocks = (columns + kDeltaBlockColumns - 1) / kDeltaBlockColumns;
  const std::int64_t num_groups = (columns - 1) / tensor.group_size + 1;
  std::vector<StoredTensor> stored{{Role::kValues,
                                    tensor.name + (has_states(tensor.type) ? ".codes" : ".values"),
                                    Shape({rows, num_blocks * delta_block_bytes(tensor.type)})}};
  if (has_indices(tensor.type)) {
    stored.push_back({Role::kIndices, tensor.name + ".indices", Shape({rows, num_blocks * 4})});
  }
  stored.push_back({Role::kScales, tensor.name + ".scales", Shape({rows, num_groups})});
  return stored;
}

}  // namespace deltazip
