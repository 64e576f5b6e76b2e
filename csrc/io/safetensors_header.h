#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "deltazip/base/tensor_view.h"

namespace deltazip {

// What a safetensors header says, its types checked; offsets are not yet held against the file.
struct SafetensorsHeader {
  struct Tensor {
    std::string name;
    DType dtype = DType::kFloat32;
    Shape shape;
    std::uint64_t num_bytes = 0;       // of dtype and shape
    std::uint64_t begin = 0, end = 0;  // data_offsets
  };
  std::vector<Tensor> tensors;  // as they came
  std::map<std::string, std::string, std::less<>> metadata;
};

// Memory stays within a small multiple of json.size(). Throws InvalidArgument.
SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& file_name);

}  // namespace deltazip
