#include "delta/layout.h"

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

constexpr std::size_t kPartAlignment = 64;  // a cache line; what Backend memory is aligned to

std::size_t part_bytes(const Backend& backend, const DeltaTensor& tensor) {
  switch (tensor.kind) {
    case DeltaKind::kUnchanged:
      return 0;
    case DeltaKind::kReplaced:
      return static_cast<std::size_t>(tensor.shape.num_elements()) * sizeof(float);
    case DeltaKind::kMatrix:
      return backend.tiled_bytes(tensor.matrix.type, tensor.matrix.rows, tensor.matrix.columns,
                                 tensor.matrix.group_size);
  }
  return 0;
}

}  // namespace

std::int32_t layer_of(std::string_view name) {
  constexpr std::string_view kPrefix = "model.layers.";
  constexpr std::size_t kMaxDigits = 6;
  if (!name.starts_with(kPrefix)) return -1;
  name.remove_prefix(kPrefix.size());
  const std::size_t num_digits = name.find('.');
  if (num_digits == std::string_view::npos || num_digits == 0 || num_digits > kMaxDigits) return -1;
  std::int32_t layer = 0;
  for (const char digit : name.substr(0, num_digits)) {
    if (digit < '0' || digit > '9') return -1;
    layer = 10 * layer + (digit - '0');
  }
  return layer;
}

DeltaLayout make_layout(const Backend& backend, const DeltaFile& file, std::int32_t num_layers) {
  DeltaLayout layout;
  std::vector<std::vector<std::size_t>> by_layer(static_cast<std::size_t>(num_layers) + 1);
  for (const DeltaTensor& tensor : file.tensors()) {
    const std::int32_t layer = layer_of(tensor.name);
    DZ_INTERNAL(layer < num_layers, tensor.name, " with ", num_layers, " layers");
    by_layer[static_cast<std::size_t>(layer < 0 ? num_layers : layer)].push_back(
        layout.parts.size());
    DeltaPart part;
    part.name = tensor.name;
    part.kind = tensor.kind;
    part.num_bytes = part_bytes(backend, tensor);
    if (tensor.kind == DeltaKind::kReplaced) part.num_elements = tensor.shape.num_elements();
    if (tensor.kind == DeltaKind::kMatrix) {
      part.matrix = {nullptr, backend.tiled_type(tensor.matrix.type), tensor.matrix.group_size,
                     tensor.matrix.rows, tensor.matrix.columns};
    }
    layout.parts.push_back(std::move(part));
  }
  for (const auto& parts : by_layer) {
    for (const std::size_t index : parts) {
      DeltaPart& part = layout.parts[index];
      part.offset = layout.num_bytes;
      layout.num_bytes += (part.num_bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
    }
  }
  return layout;
}

}  // namespace deltazip
