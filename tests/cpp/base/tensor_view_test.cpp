#include "deltazip/base/tensor_view.h"

#include <gtest/gtest.h>

#include <vector>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

TEST(ShapeTest, CountsAndPrints) {
  const Shape shape{4096, 11008};
  EXPECT_EQ(shape.rank(), 2);
  EXPECT_EQ(shape[1], 11008);
  EXPECT_EQ(shape.num_elements(), 45088768);
  EXPECT_EQ(shape.str(), "[4096, 11008]");
  EXPECT_EQ(Shape{}.num_elements(), 1);
  EXPECT_EQ(Shape{}.str(), "[]");
  EXPECT_EQ((Shape{3, 0, 2}).num_elements(), 0);
  EXPECT_EQ(shape, (Shape{4096, 11008}));
  EXPECT_NE(shape, (Shape{4096}));
}

TEST(ShapeTest, RefusesBadDimensions) {
  EXPECT_THROW((Shape{1, 2, 3, 4, 5}), InvalidArgument);
  EXPECT_THROW((Shape{1, -2}), InvalidArgument);
}

TEST(TensorViewTest, BytesAndConstness) {
  std::vector<std::uint16_t> values(6);
  const TensorView view{values.data(), DType::kBFloat16, {2, 3}};
  EXPECT_EQ(view.num_bytes(), 12u);
  EXPECT_EQ(view.size(1), 3);
  const ConstTensorView same = view;
  EXPECT_EQ(same.data, values.data());
  EXPECT_EQ(same.shape, view.shape);
}

}  // namespace
}  // namespace deltazip
