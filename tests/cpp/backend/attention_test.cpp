#include <algorithm>
#include <cmath>
#include <numeric>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

struct Heads {
  std::int32_t num_heads, num_kv_heads, head_dim, block_size;
};

// A KV cache with shuffled blocks for some sequences; unused slots hold NaN.
class CacheFixture {
 public:
  CacheFixture(Backend& backend, const Heads& heads, DType dtype,
               const std::vector<std::int32_t>& lengths, Rng& rng)
      : heads_(heads), dtype_(dtype) {
    std::int32_t num_blocks = 2;
    for (const std::int32_t length : lengths) num_blocks += blocks_for(length);
    std::vector<std::int32_t> order(static_cast<std::size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    const std::int64_t count =
        std::int64_t{num_blocks} * heads.num_kv_heads * heads.block_size * heads.head_dim;
    keys_.assign(static_cast<std::size_t>(count), std::nanf(""));
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
            keys_[i] = rounded(normal(rng));
            values_[i] = rounded(normal(rng));
          }
        }
      }
    }
    key_buffer_ = store(backend, keys_);
    value_buffer_ = store(backend, values_);
    layer = {key_buffer_.data(), value_buffer_.data(), num_blocks, heads.num_kv_heads,
             heads.block_size,   heads.head_dim,       dtype};
  }

  const std::vector<std::int32_t>& table(std::size_t sequence) const { return tables_[sequence]; }
  double key(std::size_t s, std::int32_t p, std::int32_t h, std::int32_t d) const {
    return static_cast<double>(keys_[place(tables_[s], p, h, d)]);
  }
  double value(std::size_t s, std::int32_t p, std::int32_t h, std::int32_t d) const {
    return static_cast<double>(values_[place(tables_[s], p, h, d)]);
  }
  KvLayer layer;

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
  float rounded(float v) const {
    if (dtype_ == DType::kBFloat16) return to_float(to_bfloat16(v));
    if (dtype_ == DType::kFloat16) return to_float(to_half(v));
    return v;
  }
  Buffer store(Backend& backend, const std::vector<float>& from) const {
    Buffer buffer = backend.allocate(from.size() * size_of(dtype_));
    for (std::size_t i = 0; i < from.size(); ++i) {
      if (dtype_ == DType::kFloat32) static_cast<float*>(buffer.data())[i] = from[i];
      if (dtype_ == DType::kFloat16) static_cast<Half*>(buffer.data())[i] = to_half(from[i]);
      if (dtype_ == DType::kBFloat16) {
        static_cast<BFloat16*>(buffer.data())[i] = to_bfloat16(from[i]);
      }
    }
    return buffer;
  }

  Heads heads_;
  DType dtype_;
  std::vector<float> keys_, values_;
  std::vector<std::vector<std::int32_t>> tables_;
  Buffer key_buffer_, value_buffer_;
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

constexpr Heads kHeads[] = {{9, 3, 64, 16}, {4, 4, 32, 8},   {8, 1, 16, 16},
                            {6, 2, 10, 5},  {2, 1, 128, 32}, {3, 3, 2, 1}};

class AttentionTest : public BackendTest {};
DZ_ON_EVERY_BACKEND(AttentionTest);

TEST_P(AttentionTest, MatchesTheReference) {
  const std::vector<std::int32_t> lengths{1, 63, 64, 65, 130, 200, 17};
  const std::vector<std::int32_t> rows{1, 1, 1, 65, 21, 1, 17};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const Heads& heads : kHeads) {
      const CacheFixture cache(backend(), heads, dtype, lengths, rng_);
      std::vector<AttentionSequence> sequences;
      std::int32_t num_rows = 0;
      for (std::size_t s = 0; s < lengths.size(); ++s) {
        sequences.push_back({num_rows, rows[s], lengths[s], cache.table(s).data()});
        num_rows += rows[s];
      }
      const std::int64_t row_size = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
      const Matrix qkv = Matrix::random(num_rows, row_size, rng_, 2.0F);
      Matrix out(num_rows, heads.num_heads * heads.head_dim);
      const float scale = 1.0F / std::sqrt(static_cast<float>(heads.head_dim));
      ops().paged_attention(out.view(), qkv.view(), cache.layer, sequences, heads.num_heads, scale,
                            stream());
      const Reference expected = attend(cache, heads, qkv, sequences, scale);
      EXPECT_LT(relative_error(out, expected), 3e-6) << name(dtype) << " dim " << heads.head_dim;
      EXPECT_LT(max_error(out, expected), 1e-5);
      EXPECT_TRUE(out.guards_intact());
    }
  }
}

// A prompt in one piece, in chunks of any size, or token by token: the same bits.
TEST_P(AttentionTest, ChunksDoNotChangeARow) {
  for (const Heads& heads : {Heads{9, 3, 64, 16}, Heads{6, 2, 10, 5}}) {
    constexpr std::int32_t kLength = 150;
    const CacheFixture cache(backend(), heads, DType::kFloat32, {kLength, 40}, rng_);
    const std::int64_t row_size = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
    const std::int64_t out_size = heads.num_heads * heads.head_dim;
    const Matrix qkv = Matrix::random(kLength, row_size, rng_);
    Matrix whole(kLength, out_size);
    const std::vector<AttentionSequence> all{{0, kLength, kLength, cache.table(0).data()}};
    ops().paged_attention(whole.view(), qkv.view(), cache.layer, all, heads.num_heads, 0.125F,
                          stream());
    for (const int num_threads : {1, 2, 3}) {
      const auto other = open_backend(GetParam(), num_threads);
      for (const std::int32_t chunk : {1, 7, 8, 64, 100}) {
        for (std::int32_t start = 0; start < kLength; start += chunk) {
          const std::int32_t count = std::min(chunk, kLength - start);
          const Matrix part = qkv.slice(start, count);
          Matrix out(count, out_size);
          const std::vector<AttentionSequence> one{
              {0, count, start + count, cache.table(0).data()}};
          other->ops().paged_attention(out.view(), part.view(), cache.layer, one, heads.num_heads,
                                       0.125F, stream());
          EXPECT_TRUE(same_bits(out.data(), whole.row(start), count * out_size))
              << "chunk " << chunk << " at " << start << " threads " << num_threads;
        }
      }
    }
    const Matrix last = qkv.slice(kLength - 1, 1);  // beside another sequence
    Matrix pair_qkv(3, row_size, 0.5F), pair(3, out_size);
    std::copy_n(last.data(), row_size, pair_qkv.row(2));
    const std::vector<AttentionSequence> both{{0, 2, 40, cache.table(1).data()},
                                              {2, 1, kLength, cache.table(0).data()}};
    ops().paged_attention(pair.view(), pair_qkv.view(), cache.layer, both, heads.num_heads, 0.125F,
                          stream());
    EXPECT_TRUE(same_bits(pair.row(2), whole.row(kLength - 1), out_size));
  }
}

TEST_P(AttentionTest, LargeScoresDoNotOverflow) {
  const Heads heads{2, 1, 16, 4};
  const CacheFixture cache(backend(), heads, DType::kFloat32, {90}, rng_);
  const Matrix qkv = Matrix::random(1, 64, rng_, 300.0F);
  Matrix out(1, 32);
  const std::vector<AttentionSequence> sequences{{0, 1, 90, cache.table(0).data()}};
  ops().paged_attention(out.view(), qkv.view(), cache.layer, sequences, 2, 1.0F, stream());
  EXPECT_LT(max_error(out, attend(cache, heads, qkv, sequences, 1.0F)), 1e-3);
}

TEST_P(AttentionTest, RefusesWhatDoesNotFit) {
  const Heads heads{4, 2, 8, 4};
  const CacheFixture cache(backend(), heads, DType::kFloat32, {10}, rng_);
  const Matrix qkv(2, 64, 1.0F), narrow(2, 63, 1.0F);
  Matrix out(2, 32), wide(2, 33);
  const std::int32_t* table = cache.table(0).data();
  const auto attend_with = [&](TensorView to, ConstTensorView from, AttentionSequence sequence,
                               std::int32_t num_heads = 4, float scale = 1.0F) {
    ops().paged_attention(to, from, cache.layer, std::span(&sequence, 1), num_heads, scale,
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
  const std::int32_t wrong[] = {0, 1, 1000};
  EXPECT_THROW(attend_with(out.view(), qkv.view(), {0, 2, 10, wrong}), InvalidArgument);
}

}  // namespace
}  // namespace deltazip::testing
