#include "deltazip/base/tensor_view.h"

#include "deltazip/base/error.h"

namespace deltazip {

Shape::Shape(std::span<const std::int64_t> dims) : rank_(static_cast<int>(dims.size())) {
  DZ_CHECK(dims.size() <= kMaxRank, "a tensor has at most ", kMaxRank, " dimensions, got ",
           dims.size());
  for (std::size_t axis = 0; axis < dims.size(); ++axis) {
    DZ_CHECK(dims[axis] >= 0, "dimension ", axis, " is negative: ", dims[axis]);
    dims_[axis] = dims[axis];
  }
}

std::int64_t Shape::num_elements() const {
  std::int64_t count = 1;
  for (int axis = 0; axis < rank_; ++axis) count *= dims_[static_cast<std::size_t>(axis)];
  return count;
}

std::string Shape::str() const {
  std::string text = "[";
  for (int axis = 0; axis < rank_; ++axis) {
    if (axis > 0) text += ", ";
    text += std::to_string(dims_[static_cast<std::size_t>(axis)]);
  }
  return text + "]";
}

}  // namespace deltazip
