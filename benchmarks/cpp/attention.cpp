// Attention over a paged cache: decode of D sequences, prefill of D, and what puts keys in place.

#include <algorithm>
#include <cmath>
#include <vector>

#include "bench.h"

namespace deltazip::bench {
namespace {

constexpr std::int32_t kBlock = 16;

// The caches of several layers, so that none is read twice in a row, and D sequences in them whose
// blocks lie in no order.
struct Cache {
  std::vector<Buffer> keys, values;
  std::vector<std::int32_t> blocks;
  std::int32_t num_blocks = 0, blocks_each = 0;
  double layer_bytes = 0.0;

  KvLayer layer(const Heads& heads, DType dtype, std::int64_t turn) const {
    const auto i = static_cast<std::size_t>(turn) % keys.size();
    return {keys[i].data(), values[i].data(), num_blocks, heads.kv, kBlock, heads.dim, dtype};
  }
};

Cache random_cache(Bench& bench, std::int64_t sequences, std::int32_t context) {
  const Heads& heads = bench.options().heads;
  Cache cache;
  cache.blocks_each = (context + kBlock - 1) / kBlock;
  cache.num_blocks = static_cast<std::int32_t>(sequences) * cache.blocks_each;
  const std::int64_t count = std::int64_t{cache.num_blocks} * heads.kv * kBlock * heads.dim;
  cache.layer_bytes =
      2.0 * static_cast<double>(count) * static_cast<double>(size_of(bench.activations()));
  constexpr std::int64_t kMaxLayers = 32;
  const std::int64_t layers =
      std::min(kMaxLayers, bench.num_copies(static_cast<std::size_t>(cache.layer_bytes)));
  const Buffer keys = bench.random(count, bench.activations());
  const Buffer values = bench.random(count, bench.activations());
  const auto copy = [&](const Buffer& from) {
    Buffer to = bench.backend().allocate(from.num_bytes());
    bench.backend().copy_on_device(to.data(), from.data(), from.num_bytes(), bench.stream());
    bench.stream().synchronize();
    return to;
  };
  for (std::int64_t i = 0; i < layers; ++i) {
    cache.keys.push_back(copy(keys));
    cache.values.push_back(copy(values));
  }
  cache.blocks.resize(static_cast<std::size_t>(cache.num_blocks));
  for (std::size_t i = 0; i < cache.blocks.size(); ++i) {
    cache.blocks[i] = static_cast<std::int32_t>(i);
  }
  std::shuffle(cache.blocks.begin(), cache.blocks.end(), bench.rng());
  return cache;
}

}  // namespace

void bench_attention(Bench& bench) {
  const Heads& heads = bench.options().heads;
  const std::int64_t row = std::int64_t{heads.query + 2 * heads.kv} * heads.dim;
  for (const std::int64_t context : bench.options().contexts) {
    const auto length = static_cast<std::int32_t>(context);
    for (const std::int64_t count : bench.options().deltas) {
      const Cache cache = random_cache(bench, count, length);
      for (const bool is_prefill : {false, true}) {
        const std::int32_t rows_each = is_prefill ? length : 1;
        const std::int64_t rows = count * rows_each;
        std::vector<AttentionSequence> sequences;
        for (std::int32_t s = 0; s < count; ++s) {
          const auto first = static_cast<std::ptrdiff_t>(s) * cache.blocks_each;
          sequences.push_back({s * rows_each, rows_each, length, cache.blocks.data() + first});
        }
        const Buffer qkv = bench.random(rows * row, bench.activations());
        const Buffer out = bench.random(rows * heads.query * heads.dim, bench.activations());
        const double pairs = is_prefill ? 0.5 * length * (length + 1.0) : length;
        const Label label{is_prefill ? "prefill" : "decode",
                          std::string(name(bench.activations())),
                          length,
                          heads.dim,
                          count,
                          rows_each,
                          cache.layer_bytes,
                          4.0 * pairs * heads.query * heads.dim * static_cast<double>(count)};
        const float scale = 1.0F / std::sqrt(static_cast<float>(heads.dim));
        bench.measure(label, static_cast<std::int64_t>(cache.keys.size()), [&](std::int64_t turn) {
          bench.backend().ops().paged_attention(
              bench.view(out, rows, std::int64_t{heads.query} * heads.dim),
              bench.view(qkv, rows, row), cache.layer(heads, bench.activations(), turn), sequences,
              heads.query, scale, bench.stream());
        });
      }
    }
  }
}

void bench_rope_append(Bench& bench) {
  const Heads& heads = bench.options().heads;
  const std::int64_t columns = std::int64_t{heads.query + 2 * heads.kv} * heads.dim;
  for (const std::int64_t rows : bench.options().tokens) {
    const Cache cache = random_cache(bench, rows, kBlock);
    const Buffer angles = bench.random(rows * heads.dim, DType::kFloat32);
    std::vector<std::int32_t> angle_rows;
    std::vector<std::int64_t> slots;
    for (std::int32_t r = 0; r < rows; ++r) {
      angle_rows.push_back(r);
      slots.push_back(std::int64_t{cache.blocks[static_cast<std::size_t>(r)]} * kBlock);
    }
    const Buffer qkv = bench.random(rows * columns, bench.activations());
    // q and k are read and written in place, k and v written to the cache, v read.
    const double moved = static_cast<double>(rows * heads.dim) *
                         static_cast<double>(size_of(bench.activations())) *
                         (2.0 * heads.query + 5.0 * heads.kv);
    const Label label{"rope_append",
                      std::string(name(bench.activations())),
                      columns,
                      heads.dim,
                      0,
                      rows,
                      moved,
                      0.0};
    bench.measure(label, static_cast<std::int64_t>(cache.keys.size()), [&](std::int64_t turn) {
      bench.backend().ops().rope_append(
          bench.view(qkv, rows, columns),
          {angles.data(), DType::kFloat32, {rows, std::int64_t{heads.dim}}}, angle_rows, slots,
          cache.layer(heads, bench.activations(), turn), heads.query, bench.stream());
    });
  }
}

}  // namespace deltazip::bench
