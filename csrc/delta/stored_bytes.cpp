#include "delta/stored_bytes.h"

#include <utility>

#include "deltazip/base/error.h"
#include "deltazip/io/json_text.h"

namespace deltazip {
namespace {

using Role = StoredTensor::Role;

bool has_expected_dtype(Role role, DType dtype) {
  if (role == Role::kReplaced) return is_floating(dtype);
  return dtype == (role == Role::kScales ? DType::kFloat16 : DType::kUInt8);
}

const char* expected_dtype(Role role) {
  return role == Role::kReplaced ? "BF16, F16 or F32" : role == Role::kScales ? "F16" : "U8";
}

}  // namespace

std::size_t StoredBytes::Tensor::num_bytes() const {
  return static_cast<std::size_t>(shape.num_elements()) * size_of(dtype);
}

StoredBytes::StoredBytes(std::shared_ptr<const SafetensorsFile> file, const Manifest& manifest)
    : file_(std::move(file)), codec_(manifest.codec) {
  for (const Manifest::Tensor& tensor : manifest.tensors) {
    for (const StoredTensor& stored : stored_tensors(tensor)) claim(stored, tensor);
  }
  for (const SafetensorsEntry& entry : file_->entries()) {
    DZ_CHECK(tensors_.contains(entry.name), file_->name(), ": tensor '", printable(entry.name),
             "' ", entry.view.shape.str(), " is in the file, the manifest does not ask for it");
  }
}

void StoredBytes::claim(const StoredTensor& stored, const Manifest::Tensor& tensor) {
  const std::string at = file_->name() + ": tensor '" + printable(stored.name) + "' ";
  const SafetensorsEntry* entry = file_->find(stored.name);
  DZ_CHECK(entry != nullptr, at, "is missing, the manifest asks for ", expected_dtype(stored.role),
           " ", stored.shape.str());
  Tensor claimed{entry, stored.role, entry->view.dtype, stored.shape};
  if (codec_.empty()) {
    DZ_CHECK(has_expected_dtype(stored.role, entry->view.dtype), at, "is ",
             safetensors_name(entry->view.dtype), ", expected ", expected_dtype(stored.role));
    DZ_CHECK(entry->view.shape == stored.shape, at, "is ", entry->view.shape.str(),
             " in the file, the manifest makes it ", stored.shape.str());
  } else {
    DZ_CHECK(entry->view.dtype == DType::kUInt8 && entry->view.shape.rank() == 1, at, "is ",
             safetensors_name(entry->view.dtype), " ", entry->view.shape.str(),
             ", a packed one is U8 of one dimension");
    claimed.dtype = stored.role == Role::kReplaced ? tensor.packed_dtype
                    : stored.role == Role::kScales ? DType::kFloat16
                                                   : DType::kUInt8;
    std::int64_t num_bytes = 0;
    DZ_CHECK(!__builtin_mul_overflow(stored.shape.num_elements(),
                                     static_cast<std::int64_t>(size_of(claimed.dtype)), &num_bytes),
             at, "has shape ", stored.shape.str(), ", more than 2^63 bytes");
  }
  const bool is_new = tensors_.emplace(stored.name, claimed).second;
  DZ_CHECK(is_new, at, "belongs to two tensors of the manifest");
}

const StoredBytes::Tensor& StoredBytes::at(std::string_view name) const {
  const auto found = tensors_.find(name);
  DZ_INTERNAL(found != tensors_.end(), "no stored tensor ", name);
  return found->second;
}

std::span<const std::byte> StoredBytes::mapped(const Tensor& tensor) const {
  return codec_.empty() ? tensor.entry->bytes() : std::span<const std::byte>();
}

template <typename Use>
void StoredBytes::decode(const Tensor& tensor, Use use) const {
  const std::unique_ptr<Codec> codec = Codec::make(codec_);
  const auto read = [&](std::size_t offset, std::span<std::byte> out) {
    file_->read(*tensor.entry, offset, out);
  };
  use(StreamDecoder(*codec, read, tensor.entry->view.num_bytes(), tensor.num_bytes(),
                    size_of(tensor.dtype),
                    file_->name() + ": tensor '" + printable(tensor.entry->name) + "': "));
}

void StoredBytes::stream(
    const Tensor& tensor,
    const std::function<void(std::size_t, std::span<const std::byte>)>& piece) const {
  if (codec_.empty()) {
    file_->stream(*tensor.entry, piece);
  } else {
    decode(tensor, [&](StreamDecoder&& decoder) { decoder.stream(piece); });
  }
}

void StoredBytes::read(const Tensor& tensor, std::span<std::byte> out) const {
  if (codec_.empty()) {
    file_->read(*tensor.entry, 0, out);
  } else {
    decode(tensor, [&](StreamDecoder&& decoder) { decoder.decode_all(out); });
  }
}

}  // namespace deltazip
