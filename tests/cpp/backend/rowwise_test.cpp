// The ops that treat every row for itself.

#include <algorithm>
#include <cmath>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

class RowwiseTest : public BackendTest {
 protected:
  // float16 has nothing between 0 and this; the others reach further than any test.
  double smallest() const { return dtype() == DType::kFloat16 ? 0x1p-24 : 0.0; }
};
DZ_ON_EVERY_BACKEND(RowwiseTest);

TEST_P(RowwiseTest, EmbedGathersTheTableAndTheRowsDelta) {
  for (const DType stored : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const std::int64_t size : {100, 576}) {
      const Weight table(backend(), stream(), 133, size, stored, rng_);
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
        EXPECT_LT(max_error(out, expected), tolerance(1e-6)) << name(stored) << " " << name(type);
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
  Matrix y = random(3, 83);
  const Matrix before = y;
  const std::vector<const float*> biases{bias.row(1), nullptr, bias.row(0)};
  ops().bias_add(y.view(), biases, stream());
  for (std::int64_t i = 0; i < 83; ++i) {
    const float first = before.row(0)[i] + bias.row(1)[i];
    const float last = before.row(2)[i] + bias.row(0)[i];
    EXPECT_NEAR(y.row(0)[i], first, tolerance(0.0) * std::abs(first) + smallest());
    EXPECT_EQ(y.row(1)[i], before.row(1)[i]);
    EXPECT_NEAR(y.row(2)[i], last, tolerance(0.0) * std::abs(last) + smallest());
  }
  EXPECT_TRUE(y.guards_intact());
  EXPECT_THROW(ops().bias_add(y.view(), std::span(biases).first(2), stream()), InvalidArgument);
}

TEST_P(RowwiseTest, RmsNormMatchesTheReference) {
  for (const std::int64_t size : {1, 7, 576, 1000, 3584, 4096, 8192}) {
    for (const bool has_x : {true, false}) {
      const Matrix x = random(5, size);
      const Matrix gains = Matrix::random(2, size, rng_);
      Matrix residual = random(5, size, 3.0F), out(5, size);
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
      EXPECT_LT(max_error(out, expected), tolerance(1e-6)) << size;
      EXPECT_LT(max_error(residual, expected_residual), tolerance(1e-6)) << size;
      if (!has_x) {
        EXPECT_TRUE(same_bits(residual.data(), before.data(), 5 * size));
      }
      EXPECT_TRUE(out.guards_intact() && residual.guards_intact());
    }
  }
}

TEST_P(RowwiseTest, RmsNormOfARowDoesNotDependOnItsBatch) {
  const Matrix x = random(90, 576), gain = Matrix::random(1, 576, rng_);
  const Matrix residual = random(90, 576);
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
      const float gate =
          rounded(-80.0F + 160.0F * static_cast<float>(i) / static_cast<float>(size));
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
    EXPECT_NEAR(out.data()[i], expected[i],
                tolerance(1e-6) * std::abs(expected[i]) + 1e-36 + smallest());
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

// Heads and sizes of real models: 64, 96 and 128 wide, queries per key 1, 3, 4 and 8; and odd ones.
constexpr KvLayer kCaches[] = {
    {.num_blocks = 5, .num_kv_heads = 3, .block_size = 16, .head_dim = 64},
    {.num_blocks = 5, .num_kv_heads = 2, .block_size = 16, .head_dim = 96},
    {.num_blocks = 5, .num_kv_heads = 1, .block_size = 32, .head_dim = 128},
    {.num_blocks = 5, .num_kv_heads = 2, .block_size = 4, .head_dim = 10},
    {.num_blocks = 5, .num_kv_heads = 2, .block_size = 4, .head_dim = 2}};

TEST_P(RowwiseTest, RopeAppendRotatesAndStores) {
  constexpr float kUntouched = 0.375F;
  for (const DType stored : cache_dtypes()) {
    for (KvLayer shape : kCaches) {
      shape.dtype = stored;
      const std::int32_t dim = shape.head_dim, kv_heads = shape.num_kv_heads, heads = 3 * kv_heads;
      const std::int32_t block_size = shape.block_size;
      const std::int64_t row_size = (heads + 2 * kv_heads) * dim;
      std::vector<float> expected_keys(num_elements(shape), kUntouched);
      std::vector<float> expected_values = expected_keys;
      const KvMemory cache(backend(), stream(), shape, expected_keys, expected_values);
      Matrix qkv = random(4, row_size);
      const Matrix before = qkv, angles = Matrix::random(4, dim, rng_);
      const std::vector<std::int32_t> angle_rows{3, 0, 2, 1};
      const std::vector<std::int64_t> slots{7, 5 * block_size - 1, -1,
                                            0};  // the third has no place
      ops().rope_append(qkv.view(), angles.view(), angle_rows, slots, cache.layer(), heads,
                        stream());
      for (std::int64_t row = 0; row < 4; ++row) {
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
              EXPECT_NEAR(qkv.row(row)[head * dim + i], rotated,
                          tolerance(1e-5) * std::max(1.0, std::abs(rotated)));
              continue;
            }
            if (slots[r] < 0) continue;
            const bool is_key = head < heads + kv_heads;
            const std::int32_t kv_head = (head - heads) % kv_heads;
            const std::int64_t place = ((slots[r] / block_size * kv_heads + kv_head) * block_size +
                                        slots[r] % block_size) *
                                           dim +
                                       i;
            (is_key ? expected_keys : expected_values)[static_cast<std::size_t>(place)] =
                is_key ? static_cast<float>(rotated) : x[i];
          }
        }
      }
      const double error = stored == DType::kFloat32   ? 1e-6
                           : stored == DType::kFloat16 ? 2e-3
                                                       : 2e-2;
      const std::vector<float> keys = cache.keys(), values = cache.values();
      for (std::size_t i = 0; i < keys.size(); ++i) {  // those that nobody was given, too
        const auto near = [&](float expected) {
          return error * std::max(1.0, std::abs(static_cast<double>(expected)));
        };
        ASSERT_NEAR(keys[i], expected_keys[i], near(expected_keys[i]))
            << name(stored) << " " << dim;
        ASSERT_NEAR(values[i], expected_values[i], near(expected_values[i]));
      }
      EXPECT_TRUE(qkv.guards_intact() && cache.guards_intact());
    }
  }
}

TEST_P(RowwiseTest, RopeAppendRefusesWhatDoesNotFit) {
  const std::vector<float> zeros(2 * 2 * 4 * 8);
  const KvMemory memory(
      backend(), stream(),
      {.num_blocks = 2, .num_kv_heads = 2, .block_size = 4, .head_dim = 8, .dtype = dtype()}, zeros,
      zeros);
  const KvLayer cache = memory.layer();
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
  const Matrix x = random(9, 77);
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
