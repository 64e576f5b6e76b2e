#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

struct Heads {
  std::int32_t num_heads, num_kv_heads, head_dim, block_size;
};

// A KV cache with shuffled blocks for some sequences; unused slots hold NaN.
class CacheFixture {
 public:
  CacheFixture(Backend& backend, Stream& stream, const Heads& heads, DType dtype,
               const std::vector<std::int32_t>& lengths, Rng& rng)
      : heads_(heads) {
    KvLayer shape{.num_blocks = 2,
                  .num_kv_heads = heads.num_kv_heads,
                  .block_size = heads.block_size,
                  .head_dim = heads.head_dim,
                  .dtype = dtype};
    for (const std::int32_t length : lengths) shape.num_blocks += blocks_for(length);
    std::vector<std::int32_t> order(static_cast<std::size_t>(shape.num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    keys_.assign(num_elements(shape), std::nanf(""));
    values_ = keys_;
    std::size_t next = 0;
    std::normal_distribution<float> normal;
    for (const std::int32_t length : lengths) {
      auto& table = tables_.emplace_back();
      for (std::int32_t b = 0; b < blocks_for(length); ++b) table.push_back(order[next++]);
      for (std::int32_t p = 0; p < length; ++p) {
        for (std::int32_t h = 0; h < heads.num_kv_heads; ++h) {
          for (std::int32_t d = 0; d < heads.head_dim; ++d) {
            const auto i = place(table, p, h, d);
            keys_[i] = round_to(normal(rng), dtype);
            values_[i] = round_to(normal(rng), dtype);
          }
        }
      }
    }
    memory_.emplace(backend, stream, shape, keys_, values_);
  }

  const KvLayer& layer() const { return memory_->layer(); }
  const std::vector<std::int32_t>& table(std::size_t sequence) const { return tables_[sequence]; }
  double key(std::size_t s, std::int32_t p, std::int32_t h, std::int32_t d) const {
    return static_cast<double>(keys_[place(tables_[s], p, h, d)]);
  }
  double value(std::size_t s, std::int32_t p, std::int32_t h, std::int32_t d) const {
    return static_cast<double>(values_[place(tables_[s], p, h, d)]);
  }

 private:
  std::int32_t blocks_for(std::int32_t length) const {
    return (length + heads_.block_size - 1) / heads_.block_size;
  }
  std::size_t place(const std::vector<std::int32_t>& table, std::int32_t p, std::int32_t h,
                    std::int32_t d) const {
    const std::int64_t block = table[static_cast<std::size_t>(p / heads_.block_size)];
    return static_cast<std::size_t>(
        ((block * heads_.num_kv_heads + h) * heads_.block_size + p % heads_.block_size) *
            heads_.head_dim +
        d);
  }

  Heads heads_;
  std::vector<float> keys_, values_;
  std::vector<std::vector<std::int32_t>> tables_;
  std::optional<KvMemory> memory_;
};

Reference attend(const CacheFixture& cache, const Heads& heads, const Matrix& qkv,
                 const std::vector<AttentionSequence>& sequences, float scale) {
  Reference out(static_cast<std::size_t>(qkv.rows() * heads.num_heads * heads.head_dim));
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    for (std::int32_t r = 0; r < sequences[s].num_rows; ++r) {
      const std::int32_t num_keys = sequences[s].context_length - sequences[s].num_rows + r + 1;
      const std::int64_t row = sequences[s].first_row + r;
      for (std::int32_t h = 0; h < heads.num_heads; ++h) {
        const std::int32_t kv_head = h / (heads.num_heads / heads.num_kv_heads);
        std::vector<double> weights;
        for (std::int32_t p = 0; p < num_keys; ++p) {
          double score = 0.0;
          for (std::int32_t d = 0; d < heads.head_dim; ++d) {
            score += static_cast<double>(qkv.row(row)[h * heads.head_dim + d]) *
                     cache.key(s, p, kv_head, d);
          }
          weights.push_back(score * static_cast<double>(scale));
        }
        const double top = *std::max_element(weights.begin(), weights.end());
        double total = 0.0;
        for (double& w : weights) total += w = std::exp(w - top);
        for (std::int32_t d = 0; d < heads.head_dim; ++d) {
          double sum = 0.0;
          for (std::int32_t p = 0; p < num_keys; ++p) {
            sum += weights[static_cast<std::size_t>(p)] / total * cache.value(s, p, kv_head, d);
          }
          out[static_cast<std::size_t>((row * heads.num_heads + h) * heads.head_dim + d)] = sum;
        }
      }
    }
  }
  return out;
}

// Of real models: queries per key 3, 1, 4 and 8, heads 64, 96 and 128 wide.
constexpr Heads kRealHeads[] = {{9, 3, 64, 16}, {2, 2, 96, 16}, {8, 2, 128, 32}, {8, 1, 128, 8}};
// What only the CPU, which has one loop for all, promises to take.
constexpr Heads kOddHeads[] = {
    {4, 4, 32, 8}, {8, 1, 16, 16}, {6, 2, 10, 5}, {2, 1, 128, 32}, {3, 3, 2, 1}};

class AttentionTest : public BackendTest {
 protected:
  std::vector<Heads> heads() const {
    std::vector<Heads> all(std::begin(kRealHeads), std::end(kRealHeads));
    if (!is_device()) all.insert(all.end(), std::begin(kOddHeads), std::end(kOddHeads));
    return all;
  }
  // Sequences of these lengths, of which the last rows are asked about.
  void expect_reference(const Heads& heads, DType dtype, const std::vector<std::int32_t>& lengths,
                        const std::vector<std::int32_t>& rows) {
    const CacheFixture cache(backend(), stream(), heads, dtype, lengths, rng_);
    std::vector<AttentionSequence> sequences;
    std::int32_t num_rows = 0;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      sequences.push_back({num_rows, rows[s], lengths[s], cache.table(s).data()});
      num_rows += rows[s];
    }
    const std::int64_t row_size = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
    const Matrix qkv = random(num_rows, row_size, 2.0F);
    Matrix out(num_rows, heads.num_heads * heads.head_dim);
    const float scale = 1.0F / std::sqrt(static_cast<float>(heads.head_dim));
    ops().paged_attention(out.view(), qkv.view(), cache.layer(), sequences, heads.num_heads, scale,
                          stream());
    const Reference expected = attend(cache, heads, qkv, sequences, scale);
    EXPECT_LT(relative_error(out, expected), tolerance(3e-6))
        << name(dtype) << " heads " << heads.num_heads << "/" << heads.num_kv_heads << " of "
        << heads.head_dim << ", " << num_rows << " rows";
    EXPECT_LT(max_error(out, expected), tolerance(1e-5));
    EXPECT_TRUE(out.guards_intact());
  }
};
DZ_ON_EVERY_BACKEND(AttentionTest);

TEST_P(AttentionTest, SmallBatchesMatchTheReference) {
  for (const DType dtype : cache_dtypes()) {
    for (const Heads& each : heads()) {
      expect_reference(each, dtype, {1, 63, 64, 65, 130, 200, 17}, {1, 1, 1, 65, 21, 1, 17});
    }
  }
}

TEST_P(AttentionTest, DecodesOneRowOfEachSequence) {
  for (const DType dtype : cache_dtypes()) {
    for (const Heads& each : heads()) {
      expect_reference(each, dtype, {1, 15, 16, 17, 255, 256, 257, 700}, std::vector(8, 1));
    }
  }
}

TEST_P(AttentionTest, OneLongSequenceAmongShortOnes) {
  const Heads& heads = kRealHeads[2];
  expect_reference(heads, cache_dtypes().front(), {3000, 3, 40}, {1, 1, 1});
  expect_reference(heads, cache_dtypes().front(), {600, 3, 40}, {300, 1, 2});
}

// Rows that a padded step adds: sequences of nothing, whose blocks may not even be there.
TEST_P(AttentionTest, SequencesWithoutRowsAreSkipped) {
  const Heads heads{9, 3, 64, 16};
  const CacheFixture cache(backend(), stream(), heads, cache_dtypes().front(), {40, 70}, rng_);
  const Matrix qkv = random(4, 15 * 64);
  Matrix out(4, 9 * 64, 0.25F);
  const std::vector<AttentionSequence> sequences{{0, 1, 40, cache.table(0).data()},
                                                 {1, 0, 0, nullptr},
                                                 {1, 1, 70, cache.table(1).data()},
                                                 {2, 0, 0, nullptr},
                                                 {3, 0, 0, nullptr}};
  ops().paged_attention(out.view(), qkv.view(), cache.layer(), sequences, 9, 0.125F, stream());
  Reference expected =
      attend(cache, heads, qkv, {sequences[0], sequences[2]}, 0.125F);  // of rows 0 and 1
  std::fill(expected.begin() + 2 * 9 * 64, expected.end(), 0.25);
  EXPECT_LT(max_error(out, expected), tolerance(1e-5));
  for (std::int64_t i = 2 * 9 * 64; i < 4 * 9 * 64; ++i) ASSERT_EQ(out.data()[i], 0.25F);
}

// A prompt in one piece, in chunks of any size, or token by token: the same bits.
TEST_P(AttentionTest, ChunksDoNotChangeARow) {
  for (const Heads& heads : {kRealHeads[0], is_device() ? kRealHeads[2] : kOddHeads[2]}) {
    constexpr std::int32_t kLength = 150;
    const CacheFixture cache(backend(), stream(), heads, cache_dtypes().front(), {kLength, 40},
                             rng_);
    const std::int64_t row_size = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
    const std::int64_t out_size = heads.num_heads * heads.head_dim;
    const Matrix qkv = random(kLength, row_size);
    Matrix whole(kLength, out_size);
    const std::vector<AttentionSequence> all{{0, kLength, kLength, cache.table(0).data()}};
    ops().paged_attention(whole.view(), qkv.view(), cache.layer(), all, heads.num_heads, 0.125F,
                          stream());
    for (const int num_threads : thread_counts()) {
      OpenedBackend other(GetParam(), num_threads);
      for (const std::int32_t chunk : {1, 7, 8, 64, 100}) {
        for (std::int32_t start = 0; start < kLength; start += chunk) {
          const std::int32_t count = std::min(chunk, kLength - start);
          const Matrix part = qkv.slice(start, count);
          Matrix out(count, out_size);
          const std::vector<AttentionSequence> one{
              {0, count, start + count, cache.table(0).data()}};
          other.ops.paged_attention(out.view(), part.view(), cache.layer(), one, heads.num_heads,
                                    0.125F, *other.stream);
          EXPECT_TRUE(same_row(out.data(), whole.row(start), count * out_size))
              << "chunk " << chunk << " at " << start << " threads " << num_threads;
        }
      }
    }
    const Matrix last = qkv.slice(kLength - 1, 1);  // beside another sequence
    Matrix pair_qkv(3, row_size, 0.5F), pair(3, out_size);
    std::copy_n(last.data(), row_size, pair_qkv.row(2));
    const std::vector<AttentionSequence> both{{0, 2, 40, cache.table(1).data()},
                                              {2, 1, kLength, cache.table(0).data()}};
    ops().paged_attention(pair.view(), pair_qkv.view(), cache.layer(), both, heads.num_heads,
                          0.125F, stream());
    EXPECT_TRUE(same_row(pair.row(2), whole.row(kLength - 1), out_size));
  }
}

TEST_P(AttentionTest, LargeScoresDoNotOverflow) {
  const Heads heads{2, 1, 64, 8};
  const CacheFixture cache(backend(), stream(), heads, cache_dtypes().front(), {90}, rng_);
  const Matrix qkv = random(1, 256, 300.0F);
  Matrix out(1, 128);
  const std::vector<AttentionSequence> sequences{{0, 1, 90, cache.table(0).data()}};
  ops().paged_attention(out.view(), qkv.view(), cache.layer(), sequences, 2, 1.0F, stream());
  EXPECT_LT(max_error(out, attend(cache, heads, qkv, sequences, 1.0F)), tolerance(1e-3));
}

TEST_P(AttentionTest, DevicesNameWhatTheyDoNotServe) {
  if (!is_device()) GTEST_SKIP() << "the CPU serves every head_dim, block_size and cache dtype";
  const auto error_of = [&](const Heads& heads, DType stored) -> std::string {
    const CacheFixture cache(backend(), stream(), heads, stored, {10}, rng_);
    const std::int64_t row_size = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
    const Matrix qkv(1, row_size, 1.0F);
    Matrix out(1, heads.num_heads * heads.head_dim);
    const AttentionSequence sequence{0, 1, 10, cache.table(0).data()};
    try {
      ops().paged_attention(out.view(), qkv.view(), cache.layer(), std::span(&sequence, 1),
                            heads.num_heads, 1.0F, stream());
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_NE(error_of({6, 2, 10, 8}, dtype()).find("head_dim"), std::string::npos);
  EXPECT_NE(error_of({2, 1, 64, 5}, dtype()).find("block_size"), std::string::npos);
  EXPECT_NE(error_of({2, 1, 64, 8}, DType::kFloat32).find("float32"), std::string::npos);
}

TEST_P(AttentionTest, RefusesWhatDoesNotFit) {
  const Heads heads{4, 2, 64, 8};
  const CacheFixture cache(backend(), stream(), heads, cache_dtypes().front(), {10}, rng_);
  const Matrix qkv(2, 512, 1.0F), narrow(2, 511, 1.0F);
  Matrix out(2, 256), wide(2, 257);
  const std::int32_t* table = cache.table(0).data();
  const auto attend_with = [&](TensorView to, ConstTensorView from, AttentionSequence sequence,
                               std::int32_t num_heads = 4, float scale = 1.0F) {
    ops().paged_attention(to, from, cache.layer(), std::span(&sequence, 1), num_heads, scale,
                          stream());
  };
  EXPECT_NO_THROW(attend_with(out.view(), qkv.view(), {0, 2, 10, table}));
  EXPECT_THROW(attend_with(wide.view(), qkv.view(), {0, 2, 10, table}), InvalidArgument);
  EXPECT_THROW(attend_with(out.view(), narrow.view(), {0, 2, 10, table}), InvalidArgument);
  EXPECT_THROW(attend_with(out.view(), qkv.view(), {1, 2, 10, table}), InvalidArgument);
  EXPECT_THROW(attend_with(out.view(), qkv.view(), {0, 2, 1, table}), InvalidArgument);
  EXPECT_THROW(attend_with(out.view(), qkv.view(), {0, 2, 10, nullptr}), InvalidArgument);
  EXPECT_THROW(attend_with(out.view(), qkv.view(), {0, 2, 10, table}, 3), InvalidArgument);
  EXPECT_THROW(attend_with(out.view(), qkv.view(), {0, 2, 10, table}, 4, std::nanf("")),
               InvalidArgument);
  const std::int32_t wrong[] = {0, 1000};
  EXPECT_THROW(attend_with(out.view(), qkv.view(), {0, 2, 10, wrong}), InvalidArgument);
}

}  // namespace
}  // namespace deltazip::testing
