#include <algorithm>
#include <cmath>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

Reference product(const Matrix& x, const Weight& weight) {
  const std::int64_t rows = weight.packed.rows, columns = weight.packed.columns;
  Reference y(static_cast<std::size_t>(x.rows() * rows));
  for (std::int64_t m = 0; m < x.rows(); ++m) {
    for (std::int64_t n = 0; n < rows; ++n) {
      double sum = 0.0;
      for (std::int64_t k = 0; k < columns; ++k) {
        sum += static_cast<double>(x.row(m)[k]) * weight.at(n, k);
      }
      y[static_cast<std::size_t>(m * rows + n)] = sum;
    }
  }
  return y;
}

struct LinearShape {
  std::int64_t columns, rows;
};
constexpr LinearShape kShapes[] = {{576, 1536}, {576, 192}, {1536, 576}, {100, 7},
                                   {1, 1},      {33, 65},   {1024, 96}};

class LinearTest : public BackendTest {};
DZ_ON_EVERY_BACKEND(LinearTest);

TEST_P(LinearTest, MatchesTheReference) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const LinearShape& shape : kShapes) {
      const Weight weight(backend(), stream(), shape.rows, shape.columns, dtype, rng_);
      for (const std::int64_t num_rows : {1, 2, 3, 5, 8, 13, 29}) {
        const Matrix x = random(num_rows, shape.columns);
        const Reference expected = product(x, weight);
        for (const Out out : outs()) {
          Matrix y(num_rows, shape.rows);
          ops().linear(y.view(), x.view(), weight.packed, stream(), out);
          EXPECT_LT(relative_error(y, expected), tolerance(2e-6, out))
              << name(dtype) << " " << shape.rows << "x" << shape.columns << " rows " << num_rows;
          EXPECT_LT(max_error(y, expected), tolerance(1e-5, out));
          EXPECT_TRUE(y.guards_intact());
        }
      }
    }
  }
}

TEST_P(LinearTest, LongRowsStayAccurate) {
  const Weight weight(backend(), stream(), 416, 11008, DType::kBFloat16, rng_);
  const Matrix x = random(3, 11008);
  Matrix y(3, 416);
  ops().linear(y.view(), x.view(), weight.packed, stream());
  EXPECT_LT(relative_error(y, product(x, weight)), tolerance(5e-6));
}

// Same seed, same output, whatever else runs: a row's bits depend on nothing but the row.
TEST_P(LinearTest, ARowDoesNotDependOnItsBatch) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    const Weight weight(backend(), stream(), 211, 1024, dtype, rng_);
    const Matrix x = random(67, 1024);
    Matrix alone(67, 211);
    for (std::int64_t row = 0; row < 67; ++row) {
      const Matrix one = x.slice(row, 1);
      Matrix y(1, 211);
      ops().linear(y.view(), one.view(), weight.packed, stream());
      std::copy_n(y.data(), 211, alone.row(row));
    }
    for (const int num_threads : thread_counts()) {
      OpenedBackend other(GetParam(), num_threads);
      for (const std::int64_t num_rows : {2, 3, 4, 5, 7, 12, 13, 24, 31, 67}) {
        const std::int64_t first =
            static_cast<std::int64_t>(rng_() % static_cast<std::uint64_t>(68 - num_rows));
        const Matrix part = x.slice(first, num_rows);
        Matrix y(num_rows, 211);
        other.ops.linear(y.view(), part.view(), weight.packed, *other.stream);
        EXPECT_TRUE(same_row(y.data(), alone.row(first), num_rows * 211))
            << name(dtype) << " rows " << num_rows << " threads " << num_threads;
      }
    }
  }
}

TEST_P(LinearTest, RefusesWhatDoesNotFit) {
  const Weight weight(backend(), stream(), 16, 32, DType::kFloat32, rng_);
  const Matrix x = random(2, 32), narrow = random(2, 31);
  Matrix y(2, 16), short_y(1, 16), wide_y(2, 17);
  EXPECT_THROW(ops().linear(y.view(), narrow.view(), weight.packed, stream()), InvalidArgument);
  EXPECT_THROW(ops().linear(short_y.view(), x.view(), weight.packed, stream()), InvalidArgument);
  EXPECT_THROW(ops().linear(wide_y.view(), x.view(), weight.packed, stream()), InvalidArgument);
  EXPECT_THROW(ops().linear(y.view(), x.view(), PackedMatrix{}, stream()), InvalidArgument);
  const ConstTensorView integers{x.data(), DType::kInt32, {2, 32}};
  EXPECT_THROW(ops().linear(y.view(), integers, weight.packed, stream()), InvalidArgument);
  const ConstTensorView flat{x.data(), DType::kFloat32, {64}};
  EXPECT_THROW(ops().linear(y.view(), flat, weight.packed, stream()), InvalidArgument);
  const ConstTensorView nothing{nullptr, DType::kFloat32, {2, 32}};
  EXPECT_THROW(ops().linear(y.view(), nothing, weight.packed, stream()), InvalidArgument);
}

TEST_P(LinearTest, NoRowsIsNoWork) {
  const Weight weight(backend(), stream(), 16, 32, DType::kFloat32, rng_);
  const Matrix x(0, 32);
  Matrix y(0, 16);
  EXPECT_NO_THROW(ops().linear(y.view(), x.view(), weight.packed, stream()));
}

TEST_P(LinearTest, NonFiniteWeightsAndInputsShow) {
  const Weight weight(backend(), stream(), 40, 64, DType::kFloat32, rng_);
  Matrix x = random(3, 64);
  x.row(1)[17] = std::numeric_limits<float>::quiet_NaN();
  Matrix y(3, 40, 0.0F);
  ops().linear(y.view(), x.view(), weight.packed, stream());
  for (std::int64_t n = 0; n < 40; ++n) {
    EXPECT_FALSE(std::isnan(y.row(0)[n]));
    EXPECT_TRUE(std::isnan(y.row(1)[n]));
    EXPECT_FALSE(std::isnan(y.row(2)[n]));
  }
}

}  // namespace
}  // namespace deltazip::testing
