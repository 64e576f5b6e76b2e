// The ops that treat every row for itself.

#include <algorithm>
#include <cmath>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

class RowwiseTest : public BackendTest {};
DZ_ON_EVERY_BACKEND(RowwiseTest);

TEST_P(RowwiseTest, EmbedGathersTheTableAndTheRowsDelta) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const std::int64_t size : {100, 576}) {
      const Weight table(backend(), stream(), 133, size, dtype, rng_);
      for (const DeltaType type : kDeltaTypes) {
        const Delta delta(backend(), type, 133, size, 96, rng_);
        const DeltaMatrix none{};
        const std::vector<std::int32_t> tokens{0, 132, 7, 40, 7, 31, 16};
        const std::vector<const DeltaMatrix*> deltas{&delta.matrix, &delta.matrix, nullptr,
                                                     &delta.matrix, &none,         &delta.matrix,
                                                     &delta.matrix};
        Matrix out(7, size);
        ops().embed(out.view(), tokens, table.packed, deltas, stream());
        Reference expected;
        for (std::size_t i = 0; i < tokens.size(); ++i) {
          const bool has_delta = deltas[i] == &delta.matrix;
          for (std::int64_t k = 0; k < size; ++k) {
            expected.push_back(table.at(tokens[i], k) + (has_delta ? delta.at(tokens[i], k) : 0.0));
          }
        }
        EXPECT_LT(max_error(out, expected), 1e-6) << name(dtype) << " " << name(type);
        EXPECT_TRUE(out.guards_intact());
      }
    }
  }
}

TEST_P(RowwiseTest, EmbedRefusesWhatDoesNotFit) {
  const Weight table(backend(), stream(), 10, 32, DType::kFloat32, rng_);
  const Delta other(backend(), DeltaType::kDenseInt4, 11, 32, 32, rng_);
  Matrix out(2, 32), narrow(2, 31);
  const std::vector<const DeltaMatrix*> none(2), one(1), wrong{nullptr, &other.matrix};
  const std::vector<std::int32_t> good{0, 9}, high{0, 10}, negative{-1, 0}, few{1};
  EXPECT_NO_THROW(ops().embed(out.view(), good, table.packed, none, stream()));
  EXPECT_THROW(ops().embed(out.view(), high, table.packed, none, stream()), InvalidArgument);
  EXPECT_THROW(ops().embed(out.view(), negative, table.packed, none, stream()), InvalidArgument);
  EXPECT_THROW(ops().embed(out.view(), few, table.packed, none, stream()), InvalidArgument);
  EXPECT_THROW(ops().embed(out.view(), good, table.packed, one, stream()), InvalidArgument);
  EXPECT_THROW(ops().embed(out.view(), good, table.packed, wrong, stream()), InvalidArgument);
  EXPECT_THROW(ops().embed(narrow.view(), good, table.packed, none, stream()), InvalidArgument);
}

TEST_P(RowwiseTest, BiasAddTakesEachRowsOwn) {
  const Matrix bias = Matrix::random(2, 83, rng_);
  Matrix y = Matrix::random(3, 83, rng_);
  const Matrix before = y;
  const std::vector<const float*> biases{bias.row(1), nullptr, bias.row(0)};
  ops().bias_add(y.view(), biases, stream());
  for (std::int64_t i = 0; i < 83; ++i) {
    EXPECT_EQ(y.row(0)[i], before.row(0)[i] + bias.row(1)[i]);
    EXPECT_EQ(y.row(1)[i], before.row(1)[i]);
    EXPECT_EQ(y.row(2)[i], before.row(2)[i] + bias.row(0)[i]);
  }
  EXPECT_TRUE(y.guards_intact());
  EXPECT_THROW(ops().bias_add(y.view(), std::span(biases).first(2), stream()), InvalidArgument);
}

TEST_P(RowwiseTest, RmsNormMatchesTheReference) {
  for (const std::int64_t size : {1, 7, 576, 1000, 4096}) {
    for (const bool has_x : {true, false}) {
      const Matrix x = Matrix::random(5, size, rng_);
      const Matrix gains = Matrix::random(2, size, rng_);
      Matrix residual = Matrix::random(5, size, rng_, 3.0F), out(5, size);
      const Matrix before = residual;
      const std::vector<const float*> row_gains{gains.row(0), gains.row(1), gains.row(1),
                                                gains.row(0), gains.row(1)};
      ops().rms_norm(out.view(), residual.view(), has_x ? x.view() : ConstTensorView{}, row_gains,
                     1e-5F, stream());
      Reference expected, expected_residual;
      for (std::int64_t row = 0; row < 5; ++row) {
        double squares = 0.0;
        std::vector<double> sums;
        for (std::int64_t i = 0; i < size; ++i) {
          const double sum = static_cast<double>(before.row(row)[i]) +
                             (has_x ? static_cast<double>(x.row(row)[i]) : 0.0);
          sums.push_back(sum);
          squares += sum * sum;
        }
        const double scale =
            1.0 / std::sqrt(squares / static_cast<double>(size) + static_cast<double>(1e-5F));
        for (std::int64_t i = 0; i < size; ++i) {
          const auto at = static_cast<std::size_t>(i);
          expected_residual.push_back(sums[at]);
          expected.push_back(sums[at] * scale *
                             static_cast<double>(row_gains[static_cast<std::size_t>(row)][i]));
        }
      }
      EXPECT_LT(max_error(out, expected), 1e-6) << size;
      EXPECT_LT(max_error(residual, expected_residual), 1e-6) << size;
      if (!has_x) {
        EXPECT_TRUE(same_bits(residual.data(), before.data(), 5 * size));
      }
      EXPECT_TRUE(out.guards_intact() && residual.guards_intact());
    }
  }
}

TEST_P(RowwiseTest, RmsNormOfARowDoesNotDependOnItsBatch) {
  const Matrix x = Matrix::random(90, 576, rng_), gain = Matrix::random(1, 576, rng_);
  const Matrix residual = Matrix::random(90, 576, rng_);
  Matrix all_residual = residual, all(90, 576);
  ops().rms_norm(all.view(), all_residual.view(), x.view(),
                 std::vector<const float*>(90, gain.row(0)), 1e-6F, stream());
  for (const std::int64_t row : {0, 1, 44, 89}) {
    const Matrix one_x = x.slice(row, 1);
    Matrix one_residual = residual.slice(row, 1), one(1, 576);
    const std::vector<const float*> gains{gain.row(0)};
    ops().rms_norm(one.view(), one_residual.view(), one_x.view(), gains, 1e-6F, stream());
    EXPECT_TRUE(same_bits(one.data(), all.row(row), 576));
  }
}

TEST_P(RowwiseTest, RmsNormRefusesWhatDoesNotFit) {
  Matrix residual(2, 16, 1.0F), out(2, 16), narrow(2, 15);
  const Matrix gain(1, 16, 1.0F), x(3, 16, 1.0F);
  const std::vector<const float*> good(2, gain.data()), few(1, gain.data()),
      missing{gain.data(), nullptr};
  const auto norm = [&](TensorView to, ConstTensorView from, std::span<const float* const> gains,
                        float epsilon) {
    ops().rms_norm(to, residual.view(), from, gains, epsilon, stream());
  };
  EXPECT_NO_THROW(norm(out.view(), {}, good, 1e-5F));
  EXPECT_THROW(norm(narrow.view(), {}, good, 1e-5F), InvalidArgument);
  EXPECT_THROW(norm(out.view(), x.view(), good, 1e-5F), InvalidArgument);
  EXPECT_THROW(norm(out.view(), {}, few, 1e-5F), InvalidArgument);
  EXPECT_THROW(norm(out.view(), {}, missing, 1e-5F), InvalidArgument);
  EXPECT_THROW(norm(out.view(), {}, good, -1.0F), InvalidArgument);
}

TEST_P(RowwiseTest, SiluMulIsAccurateOverTheWholeRange) {
  const std::int64_t size = 4099;
  Matrix gate_up(2, 2 * size), out(2, size);
  Reference expected(static_cast<std::size_t>(2 * size));
  for (std::int64_t row = 0; row < 2; ++row) {
    for (std::int64_t i = 0; i < size; ++i) {
      const float gate = -80.0F + 160.0F * static_cast<float>(i) / static_cast<float>(size);
      const float up = row == 0 ? 1.0F : -0.25F;
      gate_up.row(row)[i] = gate;
      gate_up.row(row)[size + i] = up;
      expected[static_cast<std::size_t>(row * size + i)] =
          static_cast<double>(gate) / (1.0 + std::exp(-static_cast<double>(gate))) *
          static_cast<double>(up);
    }
  }
  ops().silu_mul(out.view(), gate_up.view(), stream());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(out.data()[i], expected[i], 1e-6 * std::abs(expected[i]) + 1e-36);
  }
  EXPECT_TRUE(out.guards_intact());
  Matrix odd(2, 2 * size + 1);
  EXPECT_THROW(ops().silu_mul(out.view(), odd.view(), stream()), InvalidArgument);
  EXPECT_THROW(ops().silu_mul(odd.view(), gate_up.view(), stream()), InvalidArgument);
}

TEST_P(RowwiseTest, SiluMulKeepsExtremesAndNan) {
  Matrix gate_up(1, 8), out(1, 4);
  const float values[] = {1000.0F, -1000.0F, std::numeric_limits<float>::quiet_NaN(), 0.0F};
  for (int i = 0; i < 4; ++i) {
    gate_up.data()[i] = values[i];
    gate_up.data()[4 + i] = 2.0F;
  }
  ops().silu_mul(out.view(), gate_up.view(), stream());
  EXPECT_EQ(out.data()[0], 2000.0F);
  EXPECT_NEAR(out.data()[1], 0.0F, 1e-30F);
  EXPECT_TRUE(std::isnan(out.data()[2]));
  EXPECT_EQ(out.data()[3], 0.0F);
}

float read_cache(const void* data, DType dtype, std::int64_t index) {
  if (dtype == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(data)[index]);
  if (dtype == DType::kFloat16) return to_float(static_cast<const Half*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

TEST_P(RowwiseTest, RopeAppendRotatesAndStores) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const std::int32_t dim : {64, 10, 2}) {
      const std::int32_t heads = 6, kv_heads = 2, block_size = 4, blocks = 5;
      const std::int64_t row_size = (heads + 2 * kv_heads) * dim;
      const std::size_t cache_bytes =
          static_cast<std::size_t>(blocks * kv_heads * block_size * dim) * size_of(dtype);
      Buffer keys = backend().allocate(cache_bytes), values = backend().allocate(cache_bytes);
      std::memset(keys.data(), 0x11, cache_bytes);
      std::memset(values.data(), 0x11, cache_bytes);
      const KvLayer cache{keys.data(), values.data(), blocks, kv_heads, block_size, dim, dtype};
      Matrix qkv = Matrix::random(3, row_size, rng_), angles = Matrix::random(4, dim, rng_);
      const Matrix before = qkv;
      const std::vector<std::int32_t> angle_rows{3, 0, 2};
      const std::vector<std::int64_t> slots{7, 19, 0};
      ops().rope_append(qkv.view(), angles.view(), angle_rows, slots, cache, heads, stream());
      const double tolerance = dtype == DType::kFloat32   ? 1e-6
                               : dtype == DType::kFloat16 ? 2e-3
                                                          : 2e-2;
      for (std::int64_t row = 0; row < 3; ++row) {
        const auto r = static_cast<std::size_t>(row);
        const float* cosines = angles.row(angle_rows[r]);
        for (std::int32_t head = 0; head < heads + 2 * kv_heads; ++head) {
          const float* x = before.row(row) + head * dim;
          for (std::int32_t i = 0; i < dim; ++i) {
            const std::int32_t j = i % (dim / 2);
            const double c = cosines[j], s = cosines[dim / 2 + j];
            const double low = x[j], high = x[dim / 2 + j];
            const double rotated = i < dim / 2 ? low * c - high * s : high * c + low * s;
            if (head < heads) {
              EXPECT_NEAR(qkv.row(row)[head * dim + i], rotated, 1e-5);
              continue;
            }
            const bool is_key = head < heads + kv_heads;
            const std::int32_t kv_head = (head - heads) % kv_heads;
            const std::int64_t place = ((slots[r] / block_size * kv_heads + kv_head) * block_size +
                                        slots[r] % block_size) *
                                           dim +
                                       i;
            const double expected = is_key ? rotated : static_cast<double>(x[i]);
            EXPECT_NEAR(read_cache(is_key ? keys.data() : values.data(), dtype, place), expected,
                        tolerance * std::max(1.0, std::abs(expected)));
          }
        }
      }
      // Slot 1 was given to nobody.
      const auto* bytes = static_cast<const unsigned char*>(keys.data());
      EXPECT_EQ(bytes[static_cast<std::size_t>(dim) * size_of(dtype)], 0x11);
      EXPECT_TRUE(qkv.guards_intact());
    }
  }
}

TEST_P(RowwiseTest, RopeAppendStoresNothingForARowWithoutAPlace) {
  std::vector<float> keys(2 * 4 * 8, 7.0F), values = keys;
  const KvLayer cache{keys.data(), values.data(), 2, 1, 4, 8, DType::kFloat32};
  Matrix qkv = Matrix::random(2, 3 * 8, rng_);
  const Matrix angles = Matrix::random(1, 8, rng_);
  const std::vector<std::int32_t> rows{0, 0};
  const std::vector<std::int64_t> slots{-1, 5};
  ops().rope_append(qkv.view(), angles.view(), rows, slots, cache, 1, stream());
  for (std::size_t slot = 0; slot < 8; ++slot) {
    const bool is_given = slot == 5;
    EXPECT_EQ(values[slot * 8] == 7.0F, !is_given) << "slot " << slot;
    EXPECT_EQ(keys[slot * 8] == 7.0F, !is_given) << "slot " << slot;
  }
}

TEST_P(RowwiseTest, RopeAppendRefusesWhatDoesNotFit) {
  std::vector<float> memory(2 * 2 * 4 * 8);
  const KvLayer cache{memory.data(), memory.data(), 2, 2, 4, 8, DType::kFloat32};
  Matrix qkv(2, 8 * 8, 0.0F), angles(3, 8, 1.0F), narrow(2, 63, 0.0F), odd_angles(3, 6, 1.0F);
  const std::vector<std::int32_t> rows{0, 2}, high_rows{0, 3};
  const std::vector<std::int64_t> slots{0, 7}, high_slots{0, 8}, negative{-2, 0};
  const auto append =
      [&](TensorView x, ConstTensorView cos_sin, const std::vector<std::int32_t>& angle_rows,
          const std::vector<std::int64_t>& cache_slots, const KvLayer& layer, std::int32_t heads) {
        ops().rope_append(x, cos_sin, angle_rows, cache_slots, layer, heads, stream());
      };
  EXPECT_NO_THROW(append(qkv.view(), angles.view(), rows, slots, cache, 4));
  EXPECT_THROW(append(narrow.view(), angles.view(), rows, slots, cache, 4), InvalidArgument);
  EXPECT_THROW(append(qkv.view(), odd_angles.view(), rows, slots, cache, 4), InvalidArgument);
  EXPECT_THROW(append(qkv.view(), angles.view(), high_rows, slots, cache, 4), InvalidArgument);
  EXPECT_THROW(append(qkv.view(), angles.view(), rows, high_slots, cache, 4), InvalidArgument);
  EXPECT_THROW(append(qkv.view(), angles.view(), rows, negative, cache, 4), InvalidArgument);
  EXPECT_THROW(append(qkv.view(), angles.view(), rows, slots, cache, 3), InvalidArgument);
  EXPECT_THROW(append(qkv.view(), angles.view(), {0}, slots, cache, 4), InvalidArgument);
  KvLayer empty = cache;
  empty.keys = nullptr;
  EXPECT_THROW(append(qkv.view(), angles.view(), rows, slots, empty, 4), InvalidArgument);
}

TEST_P(RowwiseTest, GatherRowsCopies) {
  const Matrix x = Matrix::random(9, 77, rng_);
  Matrix out(3, 77), narrow(3, 76);
  const std::vector<std::int32_t> rows{8, 0, 8}, high{9, 0, 0};
  ops().gather_rows(out.view(), x.view(), rows, stream());
  for (std::int64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(same_bits(out.row(i), x.row(rows[static_cast<std::size_t>(i)]), 77));
  }
  EXPECT_TRUE(out.guards_intact());
  EXPECT_THROW(ops().gather_rows(out.view(), x.view(), high, stream()), InvalidArgument);
  EXPECT_THROW(ops().gather_rows(narrow.view(), x.view(), rows, stream()), InvalidArgument);
  EXPECT_THROW(ops().gather_rows(out.view(), x.view(), std::span(rows).first(2), stream()),
               InvalidArgument);
}

}  // namespace
}  // namespace deltazip::testing
