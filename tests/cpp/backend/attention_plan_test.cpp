// The GPU's work list for attention is host code: it can be proved without a GPU.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "backend/cuda/kernels/paged_attention/plan.h"

namespace deltazip::cuda {
namespace {

struct Planned {
  AttentionShape shape;
  std::vector<std::vector<std::int32_t>> tables;
  std::vector<AttentionSequence> sequences;
  AttentionPlan plan;
};

struct Length {
  std::int32_t num_rows, context_length;
};

Planned plan_for(const std::vector<Length>& lengths, std::int32_t num_heads,
                 std::int32_t num_kv_heads, std::int32_t head_dim, std::int32_t block_size) {
  Planned planned;
  planned.tables.resize(lengths.size());
  std::int32_t row = 0, block = 100;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    const auto [num_rows, context_length] = lengths[s];
    planned.tables[s].resize(
        static_cast<std::size_t>((context_length + block_size - 1) / block_size));
    for (std::int32_t& each : planned.tables[s]) each = block++;
    planned.sequences.push_back({row, num_rows, context_length, planned.tables[s].data()});
    row += num_rows;
  }
  planned.shape = {num_heads,  num_kv_heads, head_dim,
                   block_size, row,          static_cast<std::int32_t>(lengths.size())};
  planned.plan.build(planned.sequences, planned.shape);
  return planned;
}

// Every packed row meets every key it may see exactly once, and no item is empty or too large.
void expect_complete(const Planned& planned) {
  const AttentionPlan& plan = planned.plan;
  const std::int32_t group = planned.shape.num_heads / planned.shape.num_kv_heads;
  std::map<std::pair<std::int32_t, std::int32_t>, std::vector<AttentionItem>> tiles;
  for (std::size_t i = 0; i < plan.num_items(); ++i) {
    const AttentionItem item = plan.item(i);
    const bool is_prefill = i >= static_cast<std::size_t>(plan.header().num_decode);
    ASSERT_GT(item.num_packed, 0);
    ASSERT_LE(item.num_packed, is_prefill ? prefill_rows(planned.shape.head_dim) : kDecodeRows);
    ASSERT_LT(item.key_begin, item.key_end);
    ASSERT_EQ(item.key_begin % kDecodeChunk, 0);
    tiles[{item.first_row, item.first_packed}].push_back(item);
  }
  const AttentionScratchSize scratch = attention_scratch_size(
      planned.shape.num_sequences, planned.shape.num_heads, planned.shape.head_dim);
  std::vector<bool> partial_used(scratch.partial_rows), counter_used(scratch.counters);
  std::size_t num_tiles = 0;
  for (const AttentionSequence& sequence : planned.sequences) {
    const std::int32_t num_packed = sequence.num_rows * group;
    for (std::int32_t packed = 0; packed < num_packed; ++num_tiles) {
      auto& items = tiles[{sequence.first_row, packed}];
      ASSERT_FALSE(items.empty()) << "packed row " << packed;
      std::sort(items.begin(), items.end(),
                [](const auto& a, const auto& b) { return a.chunk < b.chunk; });
      const AttentionItem& first = items.front();
      EXPECT_EQ(first.first_limit, sequence.context_length - sequence.num_rows + 1);
      const std::int32_t num_keys = first.first_limit + (packed + first.num_packed - 1) / group;
      std::int32_t key = 0;
      for (std::size_t c = 0; c < items.size(); ++c) {
        const AttentionItem& item = items[c];
        EXPECT_EQ(item.chunk, static_cast<std::int32_t>(c));
        EXPECT_EQ(item.num_chunks, static_cast<std::int32_t>(items.size()));
        EXPECT_EQ(item.num_packed, first.num_packed);
        EXPECT_EQ(item.key_begin, key);
        key = item.key_end;
        const std::int32_t* table = plan.words().data() + item.block_offset;
        for (std::int32_t k = item.key_begin; k < item.key_end; ++k) {
          const std::int32_t block = k / planned.shape.block_size;
          ASSERT_EQ(table[block], sequence.blocks[block]);
        }
      }
      EXPECT_EQ(key, num_keys);
      if (items.size() > 1) {
        const std::int32_t num_partial =
            static_cast<std::int32_t>(items.size()) * first.num_packed * planned.shape.num_kv_heads;
        for (std::int32_t i = 0; i < num_partial; ++i) {
          const auto at = static_cast<std::size_t>(first.partial + i);
          ASSERT_LT(at, partial_used.size());
          ASSERT_FALSE(partial_used[at]);
          partial_used[at] = true;
        }
        for (std::int32_t i = 0; i < planned.shape.num_kv_heads; ++i) {
          const auto at = static_cast<std::size_t>(first.counter + i);
          ASSERT_LT(at, counter_used.size());
          ASSERT_FALSE(counter_used[at]);
          counter_used[at] = true;
        }
      }
      packed += first.num_packed;
    }
  }
  EXPECT_EQ(num_tiles, tiles.size());
}

TEST(AttentionPlan, CoversEveryKeyOfEveryRowOnce) {
  std::mt19937 rng(7);
  for (const auto& [heads, kv_heads] :
       {std::pair{4, 4}, std::pair{6, 2}, std::pair{8, 2}, std::pair{32, 1}, std::pair{71, 1}}) {
    for (const std::int32_t head_dim : {64, 256}) {
      for (const std::int32_t block_size : {8, 16, 24, 1024}) {
        for (const std::int32_t most_rows : {1, 3, 16, 33, 700}) {
          std::vector<Length> lengths;
          for (int s = 0; s < 12; ++s) {
            const auto num_rows =
                static_cast<std::int32_t>(rng() % static_cast<unsigned>(most_rows + 1));
            const auto before = static_cast<std::int32_t>(rng() % (s % 3 == 0 ? 20000u : 700u));
            lengths.push_back({num_rows, before + std::max(num_rows, 1)});
          }
          expect_complete(plan_for(lengths, heads, kv_heads, head_dim, block_size));
        }
      }
    }
  }
}

TEST(AttentionPlan, SplitsByTheSequenceAlone) {
  const Length watched{1, 3000};
  const Planned alone = plan_for({watched}, 8, 2, 128, 16);
  const Planned among = plan_for({watched, {1, 9000}, {400, 400}, {0, 0}}, 8, 2, 128, 16);
  const auto ranges = [](const Planned& planned) {
    std::vector<std::pair<std::int32_t, std::int32_t>> found;
    for (std::size_t i = 0; i < planned.plan.num_items(); ++i) {
      const AttentionItem item = planned.plan.item(i);
      if (item.first_row == 0 && i < static_cast<std::size_t>(planned.plan.header().num_decode)) {
        found.emplace_back(item.key_begin, item.key_end);
      }
    }
    std::sort(found.begin(), found.end());
    return found;
  };
  EXPECT_EQ(ranges(alone).size(), 12u);
  EXPECT_EQ(ranges(alone), ranges(among));
}

TEST(AttentionPlan, DecodeShapesNeedNoPrefillKernel) {
  // As many sequences as rows, whatever they hold: a recorded decode step.
  const Planned planned = plan_for({{40, 90}, {0, 0}, {1, 5}, {0, 7}}, 4, 4, 128, 16);
  AttentionShape shape = planned.shape;
  EXPECT_TRUE(may_prefill(shape) || planned.plan.header().num_prefill == 0);
  shape.num_sequences = static_cast<std::int32_t>(shape.num_rows);
  EXPECT_FALSE(may_prefill(shape));
  AttentionPlan plan;
  plan.build(planned.sequences, shape);
  EXPECT_EQ(plan.header().num_prefill, 0);
  EXPECT_EQ(plan.header().num_decode, (40 + kDecodeRows - 1) / kDecodeRows + 1);
}

TEST(AttentionPlan, LongPromptsComeFirst) {
  const Planned planned = plan_for({{200, 200}, {1000, 1000}, {1, 1}}, 4, 4, 128, 16);
  const auto num_decode = static_cast<std::size_t>(planned.plan.header().num_decode);
  ASSERT_EQ(num_decode, 1u);
  ASSERT_GT(planned.plan.header().num_prefill, 5);
  for (std::size_t i = num_decode + 1; i < planned.plan.num_items(); ++i) {
    EXPECT_GE(planned.plan.item(i - 1).key_end, planned.plan.item(i).key_end);
  }
}

}  // namespace
}  // namespace deltazip::cuda
