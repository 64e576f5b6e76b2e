#pragma once

#include <cstddef>
#include <vector>

#include "deltazip/delta/delta_store.h"

namespace deltazip {

// Where everything will lie in a HostDelta's bytes: known from the manifest alone.
struct DeltaLayout {
  std::vector<DeltaPart> parts;  // by name, as DeltaFile::tensors()
  std::size_t num_bytes = 0;
};

DeltaLayout make_layout(const Backend& backend, const DeltaFile& file, std::int32_t num_layers);

}  // namespace deltazip
