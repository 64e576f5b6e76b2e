#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "deltazip/base/dtype.h"

namespace deltazip {

inline constexpr int kMaxRank = 4;

// The dimensions of a tensor, at most kMaxRank of them. "[4096, 11008]" when printed.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims) : Shape(std::span(dims.begin(), dims.size())) {}
  explicit Shape(
      std::span<const std::int64_t> dims);  // throws InvalidArgument: rank, negative size

  int rank() const { return rank_; }
  std::int64_t operator[](int axis) const { return dims_[static_cast<std::size_t>(axis)]; }
  std::int64_t num_elements() const;
  std::string str() const;
  bool operator==(const Shape&) const = default;

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

// Contiguous row-major memory seen as a tensor. Owns nothing; the memory may be a device's.
template <typename Void>
struct BasicTensorView {
  Void* data = nullptr;
  DType dtype = DType::kFloat32;
  Shape shape;

  std::int64_t size(int axis) const { return shape[axis]; }
  int rank() const { return shape.rank(); }
  std::int64_t num_elements() const { return shape.num_elements(); }
  std::size_t num_bytes() const {
    return static_cast<std::size_t>(num_elements()) * size_of(dtype);
  }
  operator BasicTensorView<const void>() const { return {data, dtype, shape}; }
};

using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;

}  // namespace deltazip
