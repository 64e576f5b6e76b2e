// Paged attention with an online softmax (Milakov & Gimelshein, 2018; Dao et al., 2022).
// Keys are taken in tiles of 64 counted from position 0, and each query walks only its own keys,
// so that a row's result does not depend on how a prompt is cut into chunks.

#include "backend/cpu/kernels/table.h"
#include "backend/cpu/kernels/vec.h"
#include "backend/cpu/layout.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

constexpr int kTileKeys = 64;
constexpr int kTileVectors = kTileKeys / kLanes;
#if defined(DZ_ISA_AVX512)
constexpr int kQueries = 4;  // x 4 vectors = 16 sums
constexpr int kVectors = 4;
#else
constexpr int kQueries = 2;
constexpr int kVectors = 2;
#endif

// One query's running softmax: sum of weighted values, sum of weights by lane, maximum.
struct QueryState {
  const float* q;  // [head_dim], scaled
  float* sum;      // [padded head_dim]
  float* weights;  // [16]
  float* scores;   // [64]
  float max;
  std::int64_t num_keys;
};

struct Tile {
  const float* keys;  // [head_dim][64]
  const float* values[kTileKeys];
};

template <int kCount>
void score_tile(const QueryState* queries, const float* keys, std::int64_t head_dim) {
  for (int v = 0; v < kTileVectors; v += kVectors) {
    F32 sums[kCount][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sums[i][j] = zero();
    }
    for (std::int64_t d = 0; d < head_dim; ++d) {
      F32 k[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) k[j] = load(keys + d * kTileKeys + (v + j) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const F32 q = set1(queries[i].q[d]);
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) sums[i][j] = fma(q, k[j], sums[i][j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) store(queries[i].scores + (v + j) * kLanes, sums[i][j]);
    }
  }
}

// Scores become weights; sums so far are rescaled to the new maximum.
void soften_tile(QueryState& query, std::int64_t num_valid, std::int64_t padded_dim) {
  const float minus_infinity = bits_to_float(0xFF800000u);
  for (std::int64_t j = num_valid; j < kTileKeys; ++j) query.scores[j] = minus_infinity;
  F32 top = load(query.scores);
  for (int v = 1; v < kTileVectors; ++v) top = max(top, load(query.scores + v * kLanes));
  const float tile_max = reduce_max(top);
  const float new_max = query.max > tile_max ? query.max : tile_max;
  const F32 correction = exp(set1(query.max - new_max));
  F32 weights = mul(load(query.weights), correction);
  for (int v = 0; v < kTileVectors; ++v) {
    const F32 weight = exp(sub(load(query.scores + v * kLanes), set1(new_max)));
    store(query.scores + v * kLanes, weight);
    weights = add(weights, weight);
  }
  store(query.weights, weights);
  if (new_max != query.max) {
    for (std::int64_t d = 0; d < padded_dim; d += kLanes) {
      store(query.sum + d, mul(load(query.sum + d), correction));
    }
  }
  query.max = new_max;
}

template <int kCount, int kWidth>
void add_values_part(const QueryState* queries, const Tile& tile, std::int64_t first,
                     std::int64_t last, std::int64_t d) {
  F32 sums[kCount][kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kWidth; ++j) sums[i][j] = load(queries[i].sum + d + j * kLanes);
  }
  for (std::int64_t key = first; key < last; ++key) {
    F32 values[kWidth];
#pragma GCC unroll 8
    for (int j = 0; j < kWidth; ++j) values[j] = load(tile.values[key] + d + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const F32 weight = set1(queries[i].scores[key]);
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) sums[i][j] = fma(weight, values[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kWidth; ++j) store(queries[i].sum + d + j * kLanes, sums[i][j]);
  }
}

template <int kCount>
void add_values(const QueryState* queries, const Tile& tile, std::int64_t first, std::int64_t last,
                std::int64_t padded_dim) {
  if (first >= last) return;
  std::int64_t d = 0;
  for (; d + kVectors * kLanes <= padded_dim; d += kVectors * kLanes) {
    add_values_part<kCount, kVectors>(queries, tile, first, last, d);
  }
  for (; d < padded_dim; d += kLanes) {
    add_values_part<kCount, 1>(queries, tile, first, last, d);
  }
}

template <int kCount>
void attend(QueryState* queries, const Tile& tile, std::int64_t base, std::int64_t head_dim,
            std::int64_t padded_dim) {
  score_tile<kCount>(queries, tile.keys, head_dim);
  std::int64_t num_valid[kCount], num_common = kTileKeys;
  for (int i = 0; i < kCount; ++i) {
    num_valid[i] = queries[i].num_keys - base < kTileKeys ? queries[i].num_keys - base : kTileKeys;
    if (num_valid[i] < num_common) num_common = num_valid[i];
    soften_tile(queries[i], num_valid[i], padded_dim);
  }
  add_values<kCount>(queries, tile, 0, num_common, padded_dim);
  for (int i = 0; i < kCount; ++i) {
    add_values<1>(queries + i, tile, num_common, num_valid[i], padded_dim);
  }
}

// Four floats from each of sixteen rows become four vectors of sixteen rows.
DZ_INLINE void transpose_four(const float* const* rows, std::int64_t d, float* out) {
#if defined(DZ_ISA_AVX512)
  __m512 r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + d));
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(rows[i + 4] + d), 1);
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(rows[i + 8] + d), 2);
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(rows[i + 12] + d), 3);
  }
  const __m512 low01 = _mm512_unpacklo_ps(r[0], r[1]), high01 = _mm512_unpackhi_ps(r[0], r[1]);
  const __m512 low23 = _mm512_unpacklo_ps(r[2], r[3]), high23 = _mm512_unpackhi_ps(r[2], r[3]);
  _mm512_storeu_ps(out, _mm512_shuffle_ps(low01, low23, 0x44));
  _mm512_storeu_ps(out + kTileKeys, _mm512_shuffle_ps(low01, low23, 0xEE));
  _mm512_storeu_ps(out + 2 * kTileKeys, _mm512_shuffle_ps(high01, high23, 0x44));
  _mm512_storeu_ps(out + 3 * kTileKeys, _mm512_shuffle_ps(high01, high23, 0xEE));
#elif defined(DZ_ISA_AVX2)
  for (int half = 0; half < kLanes; half += 8) {
    __m256 r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[half + i] + d)),
                                  _mm_loadu_ps(rows[half + i + 4] + d), 1);
    }
    const __m256 low01 = _mm256_unpacklo_ps(r[0], r[1]), high01 = _mm256_unpackhi_ps(r[0], r[1]);
    const __m256 low23 = _mm256_unpacklo_ps(r[2], r[3]), high23 = _mm256_unpackhi_ps(r[2], r[3]);
    _mm256_storeu_ps(out + half, _mm256_shuffle_ps(low01, low23, 0x44));
    _mm256_storeu_ps(out + half + kTileKeys, _mm256_shuffle_ps(low01, low23, 0xEE));
    _mm256_storeu_ps(out + half + 2 * kTileKeys, _mm256_shuffle_ps(high01, high23, 0x44));
    _mm256_storeu_ps(out + half + 3 * kTileKeys, _mm256_shuffle_ps(high01, high23, 0xEE));
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) out[j * kTileKeys + i] = rows[i][d + j];
  }
#endif
}

// A cached row as floats: where it lies if it can be read there, else widened into `row`.
template <DType kType>
DZ_INLINE const float* widen_row(const void* cache, std::int64_t element, std::int64_t head_dim,
                                 float* row) {
  const char* from = static_cast<const char*>(cache) + element * kBytes<kType>;
  if (kType == DType::kFloat32 && head_dim % kLanes == 0) {
    return reinterpret_cast<const float*>(from);
  }
  std::int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    store(row + d, load_as<kType>(from + d * kBytes<kType>));
  }
  if (d < head_dim) {
    char raw[kLanes * kBytes<kType>] = {};
    std::memcpy(raw, from + d * kBytes<kType>,
                static_cast<std::size_t>((head_dim - d) * kBytes<kType>));
    store(row + d, load_as<kType>(raw));
  }
  return row;
}

// Keys transposed to [padded head_dim][64], values as rows. Keys past the last are zeros: they are
// never weighed, but must not be NaN.
template <DType kType>
void load_tile(const AttentionItem& item, std::int64_t base, std::int64_t num_keys, float* keys,
               float* rows, Tile& tile) {
  const KvLayer& cache = item.params->cache;
  const std::int64_t head_dim = cache.head_dim, padded_dim = align_up(head_dim, kLanes);
  float* zeros = rows + 2 * kTileKeys * padded_dim;
  std::memset(zeros, 0, sizeof(float) * static_cast<std::size_t>(padded_dim));
  const float* key_rows[kTileKeys];
  for (std::int64_t j = 0; j < kTileKeys; ++j) {
    key_rows[j] = tile.values[j] = zeros;
    if (j >= num_keys) continue;
    const std::int64_t block = item.sequence->blocks[(base + j) / cache.block_size];
    const std::int64_t offset = (base + j) % cache.block_size;
    const std::int64_t element =
        ((block * cache.num_kv_heads + item.kv_head) * cache.block_size + offset) * head_dim;
    float* row = rows + 2 * j * padded_dim;
    key_rows[j] = widen_row<kType>(cache.keys, element, head_dim, row);
    tile.values[j] = widen_row<kType>(cache.values, element, head_dim, row + padded_dim);
  }
  for (std::int64_t j = 0; j < kTileKeys; j += kLanes) {
    for (std::int64_t d = 0; d < padded_dim; d += 4) {
      transpose_four(key_rows + j, d, keys + d * kTileKeys + j);
    }
  }
}

std::int64_t group_heads(const PagedAttentionParams& params) {
  return params.num_heads / params.cache.num_kv_heads;
}

template <DType kType>
void attention_of(const AttentionItem& item, float* scratch) {
  const PagedAttentionParams& params = *item.params;
  const AttentionSequence& sequence = *item.sequence;
  const std::int64_t head_dim = params.cache.head_dim, padded_dim = align_up(head_dim, kLanes);
  const std::int64_t group = group_heads(params);
  const std::int64_t row_size = (params.num_heads + 2 * params.cache.num_kv_heads) * head_dim;
  const int num_queries = static_cast<int>(item.num_rows * group);

  float* keys = scratch;
  float* rows = keys + padded_dim * kTileKeys;
  float* state = rows + (2 * kTileKeys + 1) * padded_dim;
  auto* queries = reinterpret_cast<QueryState*>(state);
  state += align_up(num_queries * static_cast<std::int64_t>(sizeof(QueryState)), 64) / 4;
  for (int i = 0; i < num_queries; ++i) {
    const std::int64_t row = item.first_row + i / group;
    QueryState& query = queries[i];
    float* q = state;
    query = {q,
             q + padded_dim,
             q + 2 * padded_dim,
             q + 2 * padded_dim + kLanes,
             bits_to_float(0xFF800000u),
             sequence.context_length - sequence.num_rows + row + 1};
    state += 2 * padded_dim + kLanes + kTileKeys;
    const float* from = static_cast<const float*>(params.qkv) +
                        (sequence.first_row + row) * row_size +
                        (item.kv_head * group + i % group) * head_dim;
    for (std::int64_t d = 0; d < head_dim; ++d) q[d] = from[d] * params.scale;
    std::memset(query.sum, 0, sizeof(float) * static_cast<std::size_t>(padded_dim));
    std::memset(query.weights, 0, sizeof(float) * kLanes);
  }

  const std::int64_t max_keys = queries[num_queries - 1].num_keys;
  for (std::int64_t base = 0; base < max_keys; base += kTileKeys) {
    Tile tile;
    tile.keys = keys;
    load_tile<kType>(item, base, max_keys - base < kTileKeys ? max_keys - base : kTileKeys, keys,
                     rows, tile);
    int i = 0;
    while (i < num_queries && queries[i].num_keys <= base) ++i;
    for (; i + kQueries <= num_queries; i += kQueries) {
      attend<kQueries>(queries + i, tile, base, head_dim, padded_dim);
    }
    if constexpr (kQueries > 2) {
      if (num_queries - i == 3) {
        attend<3>(queries + i, tile, base, head_dim, padded_dim);
        i += 3;
      }
    }
    for (; i < num_queries; ++i) attend<1>(queries + i, tile, base, head_dim, padded_dim);
  }

  for (int i = 0; i < num_queries; ++i) {
    const std::int64_t row = sequence.first_row + item.first_row + i / group;
    float* out = static_cast<float*>(params.out) +
                 (row * params.num_heads + item.kv_head * group + i % group) * head_dim;
    const F32 inverse = set1(1.0F / reduce_add(load(queries[i].weights)));
    for (std::int64_t d = 0; d < head_dim; d += kLanes) {
      const F32 value = mul(load(queries[i].sum + d), inverse);
      if (head_dim - d >= kLanes) {
        store(out + d, value);
      } else {
        store_first(out + d, value, static_cast<int>(head_dim - d));
      }
    }
  }
}

}  // namespace

void attention(const AttentionItem& item, float* scratch) {
  switch (item.params->cache.dtype) {
    case DType::kBFloat16:
      return attention_of<DType::kBFloat16>(item, scratch);
    case DType::kFloat16:
      return attention_of<DType::kFloat16>(item, scratch);
    default:
      return attention_of<DType::kFloat32>(item, scratch);
  }
}

std::int64_t attention_scratch_floats(const PagedAttentionParams& params) {
  const std::int64_t padded_dim = align_up(params.cache.head_dim, kLanes);
  const std::int64_t num_queries = kAttentionMaxRows * group_heads(params);
  const std::int64_t state_floats = 2 * padded_dim + kLanes + kTileKeys;
  return (3 * kTileKeys + 1) * padded_dim + num_queries * (state_floats + 16) + 32;
}

}  // namespace deltazip::cpu::DZ_ISA
