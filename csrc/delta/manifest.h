#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "deltazip/delta/delta_file.h"

namespace deltazip {

// The manifest of a delta file, checked by itself; what it says of stored tensors is not yet held
// against them.
struct Manifest {
  struct Tensor {
    std::string name;
    DeltaKind kind = DeltaKind::kUnchanged;
    DeltaType type = DeltaType::kSparse24Int4;  // kMatrix
    Shape shape;
    std::int32_t group_size = 0;            // kMatrix
    DType packed_dtype = DType::kBFloat16;  // kReplaced in a packed file

    std::string_view type_name() const;  // as in the file
  };
  Digest base_digest;
  Digest content_digest;
  std::string codec;            // how stored tensors are packed; empty: they are not
  std::vector<Tensor> tensors;  // by name
};

// Throws InvalidArgument that begins with `file_name`.
Manifest parse_manifest(std::string_view json, const std::string& file_name);

// A safetensors tensor that an entry of the manifest asks for.
struct StoredTensor {
  enum class Role : std::uint8_t { kReplaced, kValues, kIndices, kScales };
  Role role;
  std::string name;
  Shape shape;
};
std::vector<StoredTensor> stored_tensors(const Manifest::Tensor& tensor);

}  // namespace deltazip
