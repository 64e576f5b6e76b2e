#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "delta/manifest.h"
#include "deltazip/delta/packed_stream.h"
#include "deltazip/io/safetensors.h"

namespace deltazip {

// What the stored tensors of a delta file hold, whether they lie there as they are or packed.
class StoredBytes {
 public:
  struct Tensor {
    const SafetensorsEntry* entry = nullptr;  // where it lies
    StoredTensor::Role role = StoredTensor::Role::kReplaced;
    DType dtype = DType::kUInt8;  // of what it holds
    Shape shape;
    std::size_t num_bytes() const;
  };
  using ByName = std::map<std::string, Tensor, std::less<>>;

  // Checks names, dtypes and shapes of `file` against the manifest: none missing, none too many.
  StoredBytes(std::shared_ptr<const SafetensorsFile> file, const Manifest& manifest);

  const SafetensorsFile& file() const { return *file_; }
  const ByName& tensors() const { return tensors_; }
  const Tensor& at(std::string_view name) const;  // an InternalError if there is none
  // The bytes in the file's mapping; none of a packed file.
  std::span<const std::byte> mapped(const Tensor& tensor) const;
  // Both read the file, not the mapping. Thread-safe.
  void stream(const Tensor& tensor,
              const std::function<void(std::size_t, std::span<const std::byte>)>& piece) const;
  void read(const Tensor& tensor, std::span<std::byte> out) const;  // out: num_bytes() long

 private:
  void claim(const StoredTensor& stored, const Manifest::Tensor& tensor);
  template <typename Use>
  void decode(const Tensor& tensor, Use use) const;

  std::shared_ptr<const SafetensorsFile> file_;
  std::string codec_;  // empty: not packed
  ByName tensors_;
};

}  // namespace deltazip
