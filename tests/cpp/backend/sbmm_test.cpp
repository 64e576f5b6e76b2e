#include <algorithm>
#include <cmath>
#include <span>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

// y += x * delta^T on a task's rows and columns.
void add_product(Reference& y, std::int64_t y_columns, const Matrix& x, const Delta& delta,
                 const SbmmTask& task) {
  for (std::int64_t row = task.first_row; row < task.first_row + task.num_rows; ++row) {
    for (std::int64_t n = 0; n < delta.matrix.rows; ++n) {
      double sum = 0.0;
      for (std::int64_t k = 0; k < delta.matrix.columns; ++k) {
        sum += static_cast<double>(x.row(row)[k]) * delta.at(n, k);
      }
      y[static_cast<std::size_t>(row * y_columns + task.out_offset + n)] += sum;
    }
  }
}

Reference to_reference(const Matrix& matrix) {
  return {matrix.data(), matrix.data() + matrix.rows() * matrix.columns()};
}

struct DeltaShape {
  std::int64_t columns, rows;
  std::int32_t group_size;
};
constexpr DeltaShape kShapes[] = {{576, 1536, 64}, {576, 192, 576}, {1536, 576, 128},
                                  {100, 7, 32},    {1, 1, 32},      {33, 50, 64},
                                  {320, 96, 96},   {640, 33, 1024}};

class SbmmTest : public BackendTest {};
DZ_ON_EVERY_BACKEND(SbmmTest);

TEST_P(SbmmTest, MatchesTheReference) {
  for (const DeltaType type : kDeltaTypes) {
    for (const DeltaShape& shape : kShapes) {
      const Delta delta(backend(), type, shape.rows, shape.columns, shape.group_size, rng_);
      for (const std::int32_t num_rows : {1, 2, 3, 5, 7, 8, 11}) {
        const Matrix x = random(num_rows, shape.columns);
        const Matrix before = random(num_rows, shape.rows, 0.01F);
        const SbmmTask task{delta.matrix, 0, num_rows, 0};
        Reference expected = to_reference(before);
        add_product(expected, shape.rows, x, delta, task);
        for (const Out out : outs()) {
          Matrix y = before;
          ops().sbmm(y.view(), x.view(), std::span(&task, 1), stream(), out);
          EXPECT_LT(relative_error(y, expected), tolerance(2e-6, out))
              << name(type) << " " << shape.rows << "x" << shape.columns << " rows " << num_rows;
          EXPECT_LT(max_error(y, expected), tolerance(1e-5, out));
          EXPECT_TRUE(y.guards_intact());
        }
      }
    }
  }
}

TEST_P(SbmmTest, ALargeShape) {
  for (const DeltaType type : kDeltaTypes) {
    const Delta delta(backend(), type, 304, 11008, 128, rng_);
    const Matrix x = random(4, 11008);
    Matrix y(4, 304, 0.0F);
    const SbmmTask task{delta.matrix, 0, 4, 0};
    Reference expected = to_reference(y);
    add_product(expected, 304, x, delta, task);
    ops().sbmm(y.view(), x.view(), std::span(&task, 1), stream());
    EXPECT_LT(relative_error(y, expected), tolerance(5e-6)) << name(type);
  }
}

// Several variants, some rows with none, q | k | v side by side, mixed types and group sizes.
TEST_P(SbmmTest, ManyTasksInOneLaunch) {
  const Delta q(backend(), DeltaType::kSparse24Int4, 96, 160, 64, rng_);
  const Delta k(backend(), DeltaType::kSparse24Ternary, 40, 160, 160, rng_);
  const Delta v(backend(), DeltaType::kDenseInt8, 40, 160, 32, rng_);
  const Delta q2(backend(), DeltaType::kSparse24Int2, 96, 160, 128, rng_);
  const Delta k2(backend(), DeltaType::kDenseInt4, 40, 160, 160, rng_);
  const Matrix x = random(40, 160);
  Matrix y = random(40, 176, 0.1F);
  const std::vector<std::pair<const Delta*, SbmmTask>> cases = {
      {&q, {q.matrix, 1, 17, 0}},   {&k, {k.matrix, 1, 17, 96}},   {&v, {v.matrix, 1, 17, 136}},
      {&q2, {q2.matrix, 20, 9, 0}}, {&k2, {k2.matrix, 20, 9, 96}}, {&q, {q.matrix, 33, 1, 0}},
      {&v, {v.matrix, 34, 0, 136}}};
  std::vector<SbmmTask> tasks;
  Reference expected = to_reference(y);
  for (const auto& [delta, task] : cases) {
    tasks.push_back(task);
    add_product(expected, 176, x, *delta, task);
  }
  tasks.push_back({DeltaMatrix{}, 20, 9, 136});  // an unchanged v_proj
  const Matrix before = y;
  ops().sbmm(y.view(), x.view(), tasks, stream());
  EXPECT_LT(relative_error(y, expected), tolerance(2e-6));
  EXPECT_LT(max_error(y, expected), tolerance(1e-5));
  for (const std::int64_t row : {0, 18, 19, 29, 32, 34, 39}) {
    EXPECT_TRUE(same_bits(y.row(row), before.row(row), 176)) << "row " << row << " has no delta";
  }
}

TEST_P(SbmmTest, ARowDoesNotDependOnItsBatch) {
  for (const DeltaType type : kDeltaTypes) {
    const Delta delta(backend(), type, 150, 288, 96, rng_);
    const Matrix x = random(37, 288);
    const Matrix y = random(37, 150);
    Matrix alone = y;
    for (std::int32_t row = 0; row < 37; ++row) {
      const Matrix one = x.slice(row, 1);
      Matrix out = y.slice(row, 1);
      const SbmmTask task{delta.matrix, 0, 1, 0};
      ops().sbmm(out.view(), one.view(), std::span(&task, 1), stream());
      std::copy_n(out.data(), 150, alone.row(row));
    }
    for (const int num_threads : thread_counts()) {
      OpenedBackend other(GetParam(), num_threads);
      for (const std::int32_t num_rows : {2, 3, 4, 5, 6, 7, 8, 9, 16, 37}) {
        const auto first =
            static_cast<std::int32_t>(rng_() % static_cast<std::uint64_t>(38 - num_rows));
        Matrix out = y;
        const SbmmTask task{delta.matrix, first, num_rows, 0};
        other.ops.sbmm(out.view(), x.view(), std::span(&task, 1), *other.stream);
        EXPECT_TRUE(same_row(out.row(first), alone.row(first), num_rows * 150))
            << name(type) << " rows " << num_rows << " threads " << num_threads;
      }
    }
  }
}

TEST_P(SbmmTest, ProjectIsTheBaseProductAndTheDeltas) {
  const Weight weight(backend(), stream(), 90, 160, DType::kBFloat16, rng_);
  const Delta delta(backend(), DeltaType::kSparse24Int2, 40, 160, 64, rng_);
  const Matrix x = random(9, 160);
  const std::vector<SbmmTask> tasks = {{delta.matrix, 2, 5, 50}, {DeltaMatrix{}, 2, 5, 0}};
  Matrix y(9, 90), separate(9, 90);
  ops().project(y.view(), x.view(), weight.packed, tasks, stream());
  ops().linear(separate.view(), x.view(), weight.packed, stream());
  ops().sbmm(separate.view(), x.view(), tasks, stream());
  EXPECT_LT(relative_error(y, to_reference(separate)), tolerance(1e-6));
  EXPECT_TRUE(y.guards_intact());
  ops().project(y.view(), x.view(), weight.packed, {}, stream());
  ops().linear(separate.view(), x.view(), weight.packed, stream());
  EXPECT_LT(relative_error(y, to_reference(separate)), tolerance(1e-6));
}

// What a padded column's code or a NaN beyond x's end would do.
TEST_P(SbmmTest, PaddingHasNoEffect) {
  for (const DeltaType type : kDeltaTypes) {
    const Delta delta(backend(), type, 20, 37, 32, rng_);
    const Matrix x(2, 37, 1.0F);  // NaN follows the last row
    Matrix y(2, 20, 0.0F);
    const SbmmTask task{delta.matrix, 0, 2, 0};
    ops().sbmm(y.view(), x.view(), std::span(&task, 1), stream());
    for (std::int64_t n = 0; n < 20; ++n) {
      double sum = 0.0;
      for (std::int64_t k = 0; k < 37; ++k) sum += delta.at(n, k);
      EXPECT_NEAR(y.row(1)[n], sum, tolerance(1e-5)) << name(type);
    }
  }
}

TEST_P(SbmmTest, TiledSizeIsTheFilesUpToPadding) {
  for (const DeltaType type : kDeltaTypes) {
    const Delta delta(backend(), type, 4096, 512, 128, rng_);
    const std::size_t file_bytes = delta.values.size() + delta.indices.size() + delta.scales.size();
    const std::size_t tiled = backend().tiled_bytes(type, 4096, 512, 128);
    EXPECT_GE(tiled, file_bytes) << name(type);
    EXPECT_LE(tiled, file_bytes + file_bytes / 20) << name(type);
  }
}

TEST_P(SbmmTest, RefusesWhatDoesNotFit) {
  const Delta delta(backend(), DeltaType::kSparse24Int4, 32, 64, 64, rng_);
  const Matrix x = random(4, 64), narrow = random(4, 60);
  Matrix y(4, 48, 0.0F), short_y(3, 48, 0.0F);
  const auto launch = [&](const std::vector<SbmmTask>& tasks) {
    ops().sbmm(y.view(), x.view(), tasks, stream());
  };
  const SbmmTask good{delta.matrix, 0, 2, 0};
  EXPECT_NO_THROW(launch({good, {delta.matrix, 2, 2, 16}}));
  EXPECT_NO_THROW(launch({}));
  EXPECT_THROW(ops().sbmm(y.view(), narrow.view(), std::span(&good, 1), stream()), InvalidArgument);
  EXPECT_THROW(ops().sbmm(short_y.view(), x.view(), std::span(&good, 1), stream()),
               InvalidArgument);
  EXPECT_THROW(launch({{delta.matrix, 3, 2, 0}}), InvalidArgument);
  EXPECT_THROW(launch({{delta.matrix, -1, 2, 0}}), InvalidArgument);
  EXPECT_THROW(launch({{delta.matrix, 0, 2, 17}}), InvalidArgument);
  EXPECT_THROW(launch({{delta.matrix, 0, 2, -1}}), InvalidArgument);
  EXPECT_THROW(launch({good, {delta.matrix, 1, 2, 8}}), InvalidArgument);
  SbmmTask odd_group = good;
  odd_group.delta.group_size = 20;
  EXPECT_THROW(launch({odd_group}), InvalidArgument);
}

TEST_P(SbmmTest, TilingRefusesSpansOfTheWrongSize) {
  const Delta delta(backend(), DeltaType::kSparse24Int2, 16, 64, 32, rng_);
  std::vector<std::byte> out(backend().tiled_bytes(delta.matrix.type, 16, 64, 32));
  DeltaSource source = delta.source();
  source.values = source.values.first(source.values.size() - 1);
  EXPECT_THROW(backend().tile_delta(out.data(), source), InvalidArgument);
  source = delta.source();
  source.indices = {};
  EXPECT_THROW(backend().tile_delta(out.data(), source), InvalidArgument);
  source = delta.source();
  source.scales = source.scales.first(2);
  EXPECT_THROW(backend().tile_delta(out.data(), source), InvalidArgument);
  EXPECT_THROW(backend().tiled_bytes(delta.matrix.type, 0, 64, 32), InvalidArgument);
  EXPECT_THROW(backend().tiled_bytes(delta.matrix.type, 16, 64, 33), InvalidArgument);
}

}  // namespace
}  // namespace deltazip::testing
