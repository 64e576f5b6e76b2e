#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

// Some columns of x * weight^T.
Reference product(const Matrix& x, const Weight& weight, std::span<const std::int64_t> columns) {
  Reference y;
  for (std::int64_t m = 0; m < x.rows(); ++m) {
    for (const std::int64_t n : columns) {
      double sum = 0.0;
      for (std::int64_t k = 0; k < weight.packed.columns; ++k) {
        sum += static_cast<double>(x.row(m)[k]) * weight.at(n, k);
      }
      y.push_back(sum);
    }
  }
  return y;
}

Reference product(const Matrix& x, const Weight& weight) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(weight.packed.rows));
  std::iota(all.begin(), all.end(), 0);
  return product(x, weight, all);
}

struct LinearShape {
  std::int64_t columns, rows;
};
constexpr LinearShape kSmallShapes[] = {{576, 192}, {100, 7}, {1, 1}, {33, 65}, {1024, 96}};
constexpr LinearShape kShapes[] = {{576, 1536}, {1536, 576}};
// Of 7B models, some of their rows: a reference takes long.
constexpr LinearShape kLongShapes[] = {{11008, 416}, {4096, 688}, {3584, 1184}, {18944, 224}};

class LinearTest : public BackendTest {
 protected:
  void expect_reference(std::span<const LinearShape> shapes, DType stored,
                        std::span<const std::int64_t> row_counts);
};
DZ_ON_EVERY_BACKEND(LinearTest);

void LinearTest::expect_reference(std::span<const LinearShape> shapes, DType stored,
                                  std::span<const std::int64_t> row_counts) {
  for (const LinearShape& shape : shapes) {
    const Weight weight(backend(), stream(), shape.rows, shape.columns, stored, rng_);
    for (const std::int64_t num_rows : row_counts) {
      const Matrix x = random(num_rows, shape.columns);
      const std::vector<std::int64_t> columns = sampled_columns(shape.rows, rng_);
      const Reference expected = product(x, weight, columns);
      for (const Out out : outs()) {
        Matrix y(num_rows, shape.rows);
        ops().linear(y.view(), x.view(), weight.packed, stream(), out);
        const Matrix some = y.select(columns);
        const double limit = shape.columns > 4096 ? 5e-6 : 2e-6;
        EXPECT_LT(relative_error(some, expected), tolerance(limit, out))
            << name(stored) << " " << shape.rows << "x" << shape.columns << " rows " << num_rows;
        EXPECT_LT(max_error(some, expected), tolerance(1e-5, out));
        EXPECT_TRUE(y.guards_intact() && y.is_finite());
      }
    }
  }
}

TEST_P(LinearTest, SmallShapesMatchTheReference) {
  for (const DType stored : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    expect_reference(kSmallShapes, stored, std::vector<std::int64_t>{1, 2, 3, 5, 8, 13, 29});
  }
}

TEST_P(LinearTest, RealShapesMatchTheReference) {
  const std::vector<std::int64_t> rows{1, 2, 3, 5, 8, 13, 29, 64, 130};
  for (const DType stored : {DType::kBFloat16, DType::kFloat32}) {
    expect_reference(kShapes, stored, rows);
  }
  expect_reference(kLongShapes, DType::kBFloat16, std::vector<std::int64_t>{1, 3, 8, 33});
  const LinearShape square[] = {{4096, is_device() ? 4096 : 256}};
  expect_reference(square, DType::kBFloat16, std::vector<std::int64_t>{1, 16, 100, 300});
}

TEST_P(LinearTest, EveryElementOfASmallProduct) {
  const Weight weight(backend(), stream(), 145, 320, DType::kBFloat16, rng_);
  for (const std::int64_t num_rows : {1, 7, 40}) {
    const Matrix x = random(num_rows, 320);
    Matrix y(num_rows, 145);
    ops().linear(y.view(), x.view(), weight.packed, stream());
    EXPECT_LT(max_error(y, product(x, weight)), tolerance(1e-5));
  }
}

TEST_P(LinearTest, TheSameLaunchGivesTheSameBits) {
  const Weight weight(backend(), stream(), 1536, 576, DType::kBFloat16, rng_);
  for (const std::int64_t num_rows : {1, 24, 200}) {
    const Matrix x = random(num_rows, 576);
    Matrix first(num_rows, 1536);
    ops().linear(first.view(), x.view(), weight.packed, stream(), outs().back());
    for (int again = 0; again < 3; ++again) {
      Matrix y(num_rows, 1536);
      ops().linear(y.view(), x.view(), weight.packed, stream(), outs().back());
      EXPECT_TRUE(same_bits(y.data(), first.data(), num_rows * 1536)) << num_rows << " rows";
    }
  }
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
