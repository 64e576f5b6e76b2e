#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "deltazip/backend/backend.h"
#include "deltazip/delta/delta_cache.h"
#include "model/tiny_model.h"

namespace deltazip::test {

// A random compressed matrix as a delta file holds it, with its dense values beside it.
struct TinyDeltaMatrix {
  DeltaType type;
  std::int32_t group_size;
  std::vector<std::byte> values, indices, scales;
  std::vector<float> dense;  // [rows, columns]
  DeltaSource source(std::int64_t rows, std::int64_t columns) const;
};

TinyDeltaMatrix make_tiny_delta_matrix(DeltaType type, std::int64_t rows, std::int64_t columns,
                                       float size, std::uint32_t seed);

// A whole delta: what changes, by tensor; the rest is unchanged.
struct TinyDelta {
  std::map<std::string, TinyDeltaMatrix> matrices;
  std::map<std::string, std::vector<float>> replaced;

  // As a slot holds it. Tensors of `model` that are in neither map are kUnchanged.
  DeviceDelta on(const Backend& backend, Backend& allocator, const TinyModel& model) const;
  // Base plus the dequantised delta, in float32: the checkpoint the variant stands for.
  TinyModel merged(const TinyModel& base) const;
};

// Changes every tensor, each matrix by another type, about a third of the base's size.
TinyDelta change_everything(const TinyModel& model, std::uint32_t seed);

}  // namespace deltazip::test
