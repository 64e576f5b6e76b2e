#include <algorithm>
#include <cmath>
#include <memory>
#include <span>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

// x * delta^T of one row of x and one of the delta.
double dot(const float* x, const Delta& delta, std::int64_t row) {
  double sum = 0.0;
  for (std::int64_t k = 0; k < delta.matrix.columns; ++k) {
    sum += static_cast<double>(x[k]) * delta.at(row, k);
  }
  return sum;
}

// y += x * delta^T on a task's rows and columns.
void add_product(Reference& y, std::int64_t y_columns, const Matrix& x, const Delta& delta,
                 const SbmmTask& task) {
  for (std::int64_t row = task.first_row; row < task.first_row + task.num_rows; ++row) {
    for (std::int64_t n = 0; n < delta.matrix.rows; ++n) {
      y[static_cast<std::size_t>(row * y_columns + task.out_offset + n)] +=
          dot(x.row(row), delta, n);
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
constexpr DeltaShape kSmallShapes[] = {{576, 192, 576}, {100, 7, 32},  {1, 1, 32},
                                       {33, 50, 64},    {320, 96, 96}, {640, 33, 1024}};
constexpr DeltaShape kShapes[] = {{576, 1536, 64}, {1536, 576, 128}};
// Of 7B models, some of their rows: a reference takes long.
constexpr DeltaShape kLongShapes[] = {
    {11008, 304, 128}, {4096, 688, 128}, {3584, 592, 64}, {18944, 112, 128}};

class SbmmTest : public BackendTest {
 protected:
  void expect_reference(const DeltaShape& shape, DeltaType type,
                        std::span<const std::int32_t> row_counts);
};
DZ_ON_EVERY_BACKEND(SbmmTest);

void SbmmTest::expect_reference(const DeltaShape& shape, DeltaType type,
                                std::span<const std::int32_t> row_counts) {
  const Delta delta(backend(), type, shape.rows, shape.columns, shape.group_size, rng_);
  for (const std::int32_t num_rows : row_counts) {
    const Matrix x = random(num_rows, shape.columns);
    const Matrix before = random(num_rows, shape.rows, 0.01F);
    const SbmmTask task{delta.matrix, 0, num_rows, 0};
    const std::vector<std::int64_t> columns = sampled_columns(shape.rows, rng_);
    Reference expected;
    for (std::int64_t row = 0; row < num_rows; ++row) {
      for (const std::int64_t n : columns) {
        expected.push_back(static_cast<double>(before.row(row)[n]) + dot(x.row(row), delta, n));
      }
    }
    for (const Out out : outs()) {
      Matrix y = before;
      ops().sbmm(y.view(), x.view(), std::span(&task, 1), stream(), out);
      const Matrix some = y.select(columns);
      const double limit = shape.columns > 4096 ? 5e-6 : 2e-6;
      EXPECT_LT(relative_error(some, expected), tolerance(limit, out))
          << name(type) << " " << shape.rows << "x" << shape.columns << " rows " << num_rows;
      EXPECT_LT(max_error(some, expected), tolerance(1e-5, out));
      EXPECT_TRUE(y.guards_intact() && y.is_finite());
    }
  }
}

TEST_P(SbmmTest, SmallShapesMatchTheReference) {
  for (const DeltaType type : kDeltaTypes) {
    for (const DeltaShape& shape : kSmallShapes) {
      expect_reference(shape, type, std::vector{1, 2, 3, 5, 7, 8, 11});
    }
  }
}

TEST_P(SbmmTest, RealShapesMatchTheReference) {
  for (const DeltaType type : kDeltaTypes) {
    for (const DeltaShape& shape : kShapes) {
      expect_reference(shape, type, std::vector{1, 2, 3, 5, 7, 8, 11, 40, 130});
    }
    for (const DeltaShape& shape : kLongShapes)
      expect_reference(shape, type, std::vector{1, 4, 17});
    expect_reference({4096, is_device() ? 4096 : 128, 128}, type, std::vector{1, 8, 100, 300});
  }
}

TEST_P(SbmmTest, EveryElementOfASmallProduct) {
  for (const DeltaType type : kDeltaTypes) {
    const Delta delta(backend(), type, 145, 320, 64, rng_);
    for (const std::int32_t num_rows : {1, 7, 40}) {
      const Matrix x = random(num_rows, 320);
      Matrix y(num_rows, 145, 0.0F);
      const SbmmTask task{delta.matrix, 0, num_rows, 0};
      Reference expected = to_reference(y);
      add_product(expected, 145, x, delta, task);
      ops().sbmm(y.view(), x.view(), std::span(&task, 1), stream());
      EXPECT_LT(max_error(y, expected), tolerance(1e-5)) << name(type) << " rows " << num_rows;
    }
  }
}

// 32 variants of all types, a few rows each, and some long segments among them.
TEST_P(SbmmTest, ManyVariantsInOneLaunch) {
  std::vector<std::unique_ptr<Delta>> deltas;
  for (std::size_t d = 0; d < 32; ++d) {
    deltas.push_back(std::make_unique<Delta>(backend(), kDeltaTypes[d % std::size(kDeltaTypes)],
                                             256, 576, d % 2 == 0 ? 64 : 576, rng_));
  }
  for (const bool has_long : {false, true}) {
    std::vector<SbmmTask> tasks;
    std::int32_t num_rows = 2;  // two of the base
    for (std::size_t d = 0; d < deltas.size(); ++d) {
      const std::int32_t count = has_long && d % 8 == 3 ? 90 : 1 + static_cast<std::int32_t>(d % 3);
      tasks.push_back({deltas[d]->matrix, num_rows, count, 0});
      num_rows += count;
    }
    const Matrix x = random(num_rows, 576);
    const Matrix before = random(num_rows, 256);
    Reference expected = to_reference(before);
    for (std::size_t d = 0; d < deltas.size(); ++d) {
      add_product(expected, 256, x, *deltas[d], tasks[d]);
    }
    for (const Out out : outs()) {
      Matrix y = before, again = before;
      ops().sbmm(y.view(), x.view(), tasks, stream(), out);
      EXPECT_LT(relative_error(y, expected), tolerance(2e-6, out)) << num_rows << " rows";
      EXPECT_LT(max_error(y, expected), tolerance(1e-5, out));
      EXPECT_TRUE(same_bits(y.row(0), before.row(0), 2 * 256)) << "rows of the base";
      ops().sbmm(again.view(), x.view(), tasks, stream(), out);
      EXPECT_TRUE(same_bits(y.data(), again.data(), num_rows * 256)) << "the same launch twice";
    }
  }
}

// Several variants, some rows with none, q | k | v side by side, mixed types and group sizes.
TEST_P(SbmmTest, ManySmallTasksInOneLaunch) {
  const Delta q(backend(), DeltaType::kSparse24Int4, 96, 160, 64, rng_);
  const Delta k(backend(), DeltaType::kSparse24Ternary, 40, 160, 160, rng_);
  const Delta v(backend(), DeltaType::kDenseInt8, 40, 160, 32, rng_);
  const Delta q2(backend(), DeltaType::kSparse24Int2, 96, 160, 128, rng_);
  const Delta k2(backend(), DeltaType::kDenseInt4, 40, 160, 160, rng_);
  const Delta v2(backend(), DeltaType::kSparse14Sign, 40, 160, 128, rng_);
  const Matrix x = random(40, 160);
  Matrix y = random(40, 176, 0.1F);
  const std::vector<std::pair<const Delta*, SbmmTask>> cases = {
      {&q, {q.matrix, 1, 17, 0}},   {&k, {k.matrix, 1, 17, 96}},   {&v, {v.matrix, 1, 17, 136}},
      {&q2, {q2.matrix, 20, 9, 0}}, {&k2, {k2.matrix, 20, 9, 96}}, {&q, {q.matrix, 33, 1, 0}},
      {&v, {v.matrix, 34, 0, 136}}, {&v2, {v2.matrix, 35, 3, 136}}};
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
  for (const std::int64_t row : {0, 18, 19, 29, 32, 34, 38, 39}) {
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

TEST_P(SbmmTest, SmallProjectIsTheBaseProductAndTheDeltas) {
  const Weight weight(backend(), stream(), 90, 160, DType::kBFloat16, rng_);
  const Delta delta(backend(), DeltaType::kSparse24Int2, 40, 160, 64, rng_);
  const Matrix x = random(9, 160);
  const std::vector<SbmmTask> tasks = {{delta.matrix, 2, 5, 50}, {DeltaMatrix{}, 2, 5, 0}};
  Matrix y(9, 90), separate(9, 90);
  for (const Out out : outs()) {
    y = separate = Matrix(9, 90);
    ops().project(y.view(), x.view(), weight.packed, tasks, stream(), out);
    ops().linear(separate.view(), x.view(), weight.packed, stream(), out);
    ops().sbmm(separate.view(), x.view(), tasks, stream(), out);
    EXPECT_LT(relative_error(y, to_reference(separate)), tolerance(1e-6, out));
    EXPECT_TRUE(y.guards_intact());
  }
  ops().project(y.view(), x.view(), weight.packed, {}, stream());
  ops().linear(separate.view(), x.view(), weight.packed, stream());
  EXPECT_LT(relative_error(y, to_reference(separate)), tolerance(1e-6));
}

// Long segments may go another way than short ones: base and delta merged, then multiplied.
TEST_P(SbmmTest, ProjectOfLongSegmentsMatchesTheReference) {
  const std::int64_t columns = 1536, rows = is_device() ? 1024 : 256;
  const Weight weight(backend(), stream(), rows, columns, DType::kBFloat16, rng_);
  const Delta first(backend(), DeltaType::kSparse24Int4, rows, columns, 128, rng_);
  const Delta half(backend(), DeltaType::kSparse24Ternary, rows / 2, columns, 128, rng_);
  const std::int32_t num_rows = is_device() ? 1500 : 300;
  const std::int32_t long_rows = num_rows - 100;
  const std::vector<SbmmTask> tasks = {{first.matrix, 20, long_rows, 0},
                                       {half.matrix, long_rows + 30, 3, 0},
                                       {half.matrix, long_rows + 40, 60, rows / 2}};
  const Matrix x = random(num_rows, columns);
  const std::vector<std::int64_t> some = sampled_columns(rows, rng_);
  Reference expected;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (const std::int64_t n : some) {
      double sum = 0.0;
      for (std::int64_t k = 0; k < columns; ++k) {
        sum += static_cast<double>(x.row(row)[k]) * weight.at(n, k);
      }
      for (const SbmmTask& task : tasks) {
        const Delta& delta = task.delta.data == first.matrix.data ? first : half;
        if (row < task.first_row || row >= task.first_row + task.num_rows) continue;
        if (n < task.out_offset || n >= task.out_offset + task.delta.rows) continue;
        sum += dot(x.row(row), delta, n - task.out_offset);
      }
      expected.push_back(sum);
    }
  }
  Matrix y(num_rows, rows);
  ops().project(y.view(), x.view(), weight.packed, tasks, stream());
  EXPECT_LT(relative_error(y.select(some), expected), tolerance(5e-6));
  EXPECT_LT(max_error(y.select(some), expected), tolerance(1e-5));
  EXPECT_TRUE(y.guards_intact() && y.is_finite());
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
      const double scale = backend().shares_host_memory() ? 1.0 : std::max(1.0, std::abs(sum));
      EXPECT_NEAR(y.row(1)[n], sum, tolerance(1e-5) * scale) << name(type);
    }
  }
}

TEST_P(SbmmTest, TiledSizeIsTheFilesUpToPadding) {
  for (const DeltaType type : kDeltaTypes) {
    const Delta delta(backend(), type, 4096, 512, 128, rng_);
    const std::size_t file_bytes = delta.values.size() + delta.indices.size() + delta.scales.size();
    const std::size_t tiled = backend().tiled_bytes(type, 4096, 512, 128);
    EXPECT_EQ(tiled, backend().tiled_bytes(backend().tiled_type(type), 4096, 512, 128));
    EXPECT_GE(tiled, file_bytes) << name(type);
    if (backend().tiled_type(type) != type) continue;
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
