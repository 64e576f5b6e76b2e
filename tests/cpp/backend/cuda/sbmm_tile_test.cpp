// The device's tiling, proved on the host: what mma.sp would compute from the very words and decode
// functions of the kernel, lane by lane, against the file format's own meaning.

#include <algorithm>
#include <array>
#include <span>

#include "backend/cuda/kernels/sbmm/config.h"
#include "backend/cuda/kernels/sbmm/decode.cuh"
#include "backend/cuda/kernels/sbmm/plan.h"
#include "backend/cuda/kernels/sbmm/read.cuh"
#include "backend/cuda/kernels/sbmm/tiling.h"
#include "backend/harness.h"

namespace deltazip::testing {
namespace {

using namespace deltazip::cuda;

struct Shape {
  std::int64_t rows, columns;
  std::int32_t group_size;
};
constexpr Shape kShapes[] = {{192, 576, 64}, {576, 1536, 128}, {7, 100, 32},    {1, 1, 32},
                             {50, 33, 64},   {96, 320, 96},    {33, 640, 1024}, {130, 300, 192}};

std::vector<unsigned char> tile(const Delta& delta) {
  const DeltaMatrix& m = delta.matrix;
  std::vector<unsigned char> out(tiled_delta_bytes(m.type, m.rows, m.columns, m.group_size), 0xFF);
  tile_delta(out.data(), delta.source());
  return out;
}

double scale_at(const unsigned char* record, const RecordLayout& layout, int row, int column) {
  Half half;
  std::memcpy(&half,
              record + layout.scales_offset +
                  column / (kRecordColumns / layout.scale_parts) * kScalePartBytes +
                  2 * scale_place(row),
              2);
  return to_float(half);
}

class SbmmTileTest : public ::testing::TestWithParam<DeltaType> {
 protected:
  std::unique_ptr<Backend> cpu_ = open_backend("cpu");
  Rng rng_{7};
};
INSTANTIATE_TEST_SUITE_P(All, SbmmTileTest, ::testing::ValuesIn(std::span(kDeltaTypes).first<5>()),
                         [](const auto& entry) { return std::string(name(entry.param)); });

TEST_P(SbmmTileTest, ReadingGroupsGivesTheFileBack) {
  for (const Shape& shape : kShapes) {
    const Delta delta(*cpu_, GetParam(), shape.rows, shape.columns, shape.group_size, rng_);
    const std::vector<unsigned char> tiled = tile(delta);
    const RecordLayout layout =
        record_layout(GetParam(), shape.rows, shape.columns, shape.group_size);
    for (std::int64_t row = 0; row < shape.rows; ++row) {
      for (std::int64_t column = 0; column < shape.columns; ++column) {
        const unsigned char* record =
            tiled.data() + (row / 64 * layout.records + column / 128) * layout.record_bytes;
        const int r = static_cast<int>(row % 64), k = static_cast<int>(column % 128);
        const double value = read_group(record, GetParam(), r, k / 4).v[k % 4];
        ASSERT_EQ(value * scale_at(record, layout, r, k), delta.at(row, column))
            << row << ", " << column << " of " << shape.rows << "x" << shape.columns;
      }
    }
  }
}

// mma.sp.m16n8k32's A from registers and metadata, as the ISA defines it: [16][32].
using SparseTile = std::array<std::array<float, 32>, 16>;
struct LaneRegisters {
  std::array<std::array<float, 2>, 4> a;  // the two halves of each register
  std::uint32_t metadata;
};

SparseTile expand(const std::array<LaneRegisters, 32>& lanes, int selector) {
  SparseTile out{};
  for (int lane = 0; lane < 32; ++lane) {
    const int q = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = q + 8 * (i % 2), group = c + 4 * (i / 2);
      const std::uint32_t word =
          lanes[static_cast<std::size_t>(4 * q + 2 * selector + group / 4)].metadata;
      const std::uint32_t nibble = word >> (16 * (i % 2) + 4 * (group % 4)) & 15u;
      EXPECT_LT(nibble & 3u, nibble >> 2) << "indices must ascend";
      auto& columns = out[static_cast<std::size_t>(row)];
      columns[4 * static_cast<std::size_t>(group) + (nibble & 3u)] =
          lanes[static_cast<std::size_t>(lane)].a[static_cast<std::size_t>(i)][0];
      columns[4 * static_cast<std::size_t>(group) + (nibble >> 2)] =
          lanes[static_cast<std::size_t>(lane)].a[static_cast<std::size_t>(i)][1];
    }
  }
  return out;
}

std::uint32_t word_at(const unsigned char* from, int index) {
  std::uint32_t word;
  std::memcpy(&word, from + 4 * index, 4);
  return word;
}

// What lane holds of tile (r, j): the kernel's loads, and its bit tricks where they are bits only.
LaneRegisters registers(const unsigned char* record, DeltaType type, int r, int j, int lane) {
  LaneRegisters out{};
  const int pair = r / 2;
  if (type != DeltaType::kSparse24Ternary) {
    const unsigned char* indices = record + (type == DeltaType::kSparse24Int4 ? 2048 : 1024);
    out.metadata = word_at(indices, ((pair * 32 + lane) * 2 + r % 2) * 2 + j / 2);
  }
  if (type == DeltaType::kSparse24Int4) {
    const std::uint32_t word = word_at(record, (r * 32 + lane) * 4 + j);
    for (std::size_t i = 0; i < 4; ++i) {
      const std::uint32_t codes = word >> (4 * int4_nibble(static_cast<int>(i)));
      out.a[i] = {static_cast<float>(codes & 15u) - 8, static_cast<float>(codes >> 16 & 15u) - 8};
    }
  } else if (type == DeltaType::kSparse24Int2) {
    const std::uint32_t word = word_at(record, ((pair * 32 + lane) * 2 + r % 2) * 2 + j / 2);
    for (std::uint32_t i = 0; i < 4; ++i) {
      const std::uint32_t turned =
          rotate_right(word, 2 * (static_cast<std::uint32_t>(j) % 2 * 4 + i) + 1);
      out.a[i] = {2 * static_cast<float>(turned & 3u) - 3,
                  2 * static_cast<float>(turned >> 16 & 3u) - 3};
    }
  } else {
    const auto planes_of = [&](int other) {
      const int at = (pair * 32 + other) * 4;
      return TernaryPlanes{word_at(record, at), word_at(record, at + 1), word_at(record, at + 2)};
    };
    // A lane's word after the exchange with lane ^ 1.
    const auto exchanged = [&](int other) {
      return exchange_nibbles(ternary_singles(planes_of(other)),
                              ternary_singles(planes_of(other ^ 1)),
                              static_cast<std::uint32_t>(other));
    };
    const std::uint32_t singles =
        exchange_bytes(exchanged(lane), exchanged(lane ^ 2), static_cast<std::uint32_t>(lane));
    const TernaryDigits upper =
        ternary_digits(word_at(record, (pair * 32 + lane) * 4 + 3), singles, 0);
    const TernaryDigits lower =
        ternary_digits(word_at(record + kTernaryLowerSigns, pair * 32 + lane), singles, 1);
    std::uint32_t metadata[4];
    ternary_metadata(metadata, planes_of(lane));
    out.metadata = metadata[j / 2 * 2 + r % 2];
    const auto value = [](std::uint32_t half) {  // as fp16: sign, then 0 or the top exponent bit
      EXPECT_EQ(half & 0x3FFFu, 0u);
      return ((half & 0x4000u) != 0 ? 1.0F : 0.0F) * ((half & 0x8000u) != 0 ? -1.0F : 1.0F);
    };
    const auto put = [&](std::size_t i, std::uint32_t pair_bits) {
      out.a[i] = {value(pair_bits & 0xFFFFu), value(pair_bits >> 16)};
    };
    const auto put_all = [&]<int kTile>(std::integral_constant<int, kTile>) {
      constexpr int kR = kTile % 2, kJ = kTile / 2;
      put(0, ternary_pair<kR, kJ, 0>(upper.tile[kR]));
      put(1, ternary_pair<kR, kJ, 0>(lower.tile[kR]));
      put(2, ternary_pair<kR, kJ, 1>(upper.tile[kR]));
      put(3, ternary_pair<kR, kJ, 1>(lower.tile[kR]));
    };
    const auto put_one = [&]<int... kTile>(std::integer_sequence<int, kTile...>) {
      ((2 * j + r % 2 == kTile ? put_all(std::integral_constant<int, kTile>{}) : void()), ...);
    };
    put_one(std::make_integer_sequence<int, 8>{});
  }
  return out;
}

TEST_P(SbmmTileTest, SparseProductsSeeTheMatrix) {
  if (!is_sparse24(GetParam())) GTEST_SKIP() << "dense records feed a dense product";
  for (const Shape& shape : kShapes) {
    const Delta delta(*cpu_, GetParam(), shape.rows, shape.columns, shape.group_size, rng_);
    const std::vector<unsigned char> tiled = tile(delta);
    const RecordLayout layout =
        record_layout(GetParam(), shape.rows, shape.columns, shape.group_size);
    for (std::int64_t n = 0; n < layout.row_blocks * layout.records; ++n) {
      const unsigned char* record = tiled.data() + n * layout.record_bytes;
      for (int r = 0; r < 4; ++r) {
        for (int j = 0; j < 4; ++j) {
          std::array<LaneRegisters, 32> lanes;
          for (int lane = 0; lane < 32; ++lane) {
            lanes[static_cast<std::size_t>(lane)] = registers(record, GetParam(), r, j, lane);
          }
          const SparseTile seen = expand(lanes, j % 2);
          for (int i = 0; i < 16; ++i) {
            for (int k = 0; k < 32; ++k) {
              const std::int64_t row = n / layout.records * 64 + 16 * r + i;
              const std::int64_t column = n % layout.records * 128 + 32 * j + k;
              const double value = seen[static_cast<std::size_t>(i)][static_cast<std::size_t>(k)] *
                                   scale_at(record, layout, 16 * r + i, 32 * j + k);
              if (row >= shape.rows) {
                ASSERT_EQ(value, 0.0) << "padded row";
              } else if (column < shape.columns) {
                ASSERT_EQ(value, delta.at(row, column)) << row << ", " << column;
              }
            }
          }
        }
      }
    }
  }
}

TEST_P(SbmmTileTest, SizeIsTheFilesUpToPadding) {
  const Delta delta(*cpu_, GetParam(), 512, 1024, 128, rng_);
  const std::size_t file = delta.values.size() + delta.indices.size() + delta.scales.size();
  EXPECT_EQ(tiled_delta_bytes(GetParam(), 512, 1024, 128), file);
}

TEST_P(SbmmTileTest, RefusesSpansOfTheWrongSize) {
  const Delta delta(*cpu_, GetParam(), 16, 64, 32, rng_);
  std::vector<unsigned char> out(tiled_delta_bytes(GetParam(), 16, 64, 32));
  DeltaSource source = delta.source();
  source.values = source.values.first(source.values.size() - 1);
  EXPECT_THROW(tile_delta(out.data(), source), InvalidArgument);
  source = delta.source();
  source.scales = source.scales.first(2);
  EXPECT_THROW(tile_delta(out.data(), source), InvalidArgument);
  EXPECT_THROW(tiled_delta_bytes(GetParam(), 0, 64, 32), InvalidArgument);
  EXPECT_THROW(tiled_delta_bytes(GetParam(), 16, 64, 33), InvalidArgument);
}

void check_set(const SbmmSet& set, std::int32_t sum_bytes) {
  const SbmmDeviceTask& task = set.task;
  ASSERT_LT(set.begin, set.end);
  ASSERT_LE(set.end, task.row_blocks);
  ASSERT_GT(set.num_tokens, 0);
  ASSERT_LE(set.num_tokens, kPassTokens);
  ASSERT_LE(set.first_token + set.num_tokens, task.num_rows);
  ASSERT_LE(set.num_tokens * kSumBytesPerToken, sum_bytes);
  ASSERT_LE(sum_bytes + std::int64_t{set.num_tokens} * (task.records * 256 + kXPadBytes),
            kSharedBytes);
}

// Every item of every task belongs to exactly one CTA, whatever the mixture, its first set is the
// one that a walk would begin with, and what a set needs fits shared memory.
TEST(SbmmPlanTest, EveryItemHasOneCta) {
  Rng rng{11};
  const int dummy = 0;
  for (int round = 0; round < 300; ++round) {
    std::vector<SbmmTask> tasks;
    for (std::uint64_t i = rng() % 12; i > 0; --i) {
      SbmmTask task;
      task.delta = {rng() % 5 == 0 ? nullptr : &dummy, kDeltaTypes[rng() % 5],
                    static_cast<std::int32_t>(32 * (1 + rng() % 8)),
                    static_cast<std::int64_t>(1 + rng() % 5000),
                    static_cast<std::int64_t>(1 + rng() % 20000)};
      task.num_rows = static_cast<std::int32_t>(rng() % 3 == 0 ? rng() % 200 : rng() % 9);
      tasks.push_back(task);
    }
    SbmmPlan plan;
    const auto num_ctas = static_cast<std::int32_t>(1 + rng() % 140);
    make_sbmm_plan(plan, tasks, num_ctas);
    ASSERT_EQ(plan.ranges.size(), static_cast<std::size_t>(num_ctas));
    ASSERT_EQ(plan.tasks.size(), tasks.size());
    std::vector<std::int64_t> next(tasks.size(), 0);
    std::vector<std::vector<bool>> seen(tasks.size());  // [task][piece, row block]
    for (std::size_t t = 0; t < tasks.size(); ++t) {
      seen[t].resize(static_cast<std::size_t>(plan.tasks[t].num_items));
    }
    for (std::int32_t cta = 0; cta < num_ctas; ++cta) {
      const SbmmCtaRange& range = plan.ranges[static_cast<std::size_t>(cta)];
      bool is_first = true;
      for (std::int32_t t = range.first_task; t <= range.last_task && !tasks.empty(); ++t) {
        const auto& task = plan.tasks[static_cast<std::size_t>(t)];
        const std::int32_t first = t == range.first_task ? range.first_item : 0;
        const std::int32_t last = t == range.last_task ? range.last_item : task.num_items;
        if (first >= last) continue;
        ASSERT_EQ(first, next[static_cast<std::size_t>(t)]);
        next[static_cast<std::size_t>(t)] = last;
        SbmmSet set{};
        for (std::int32_t item = first; item < last;) {
          set.task = task;
          item += set_place(set, item, last);
          check_set(set, range.sum_bytes);
          ASSERT_EQ(set.first_token % task.piece_tokens, 0);
          for (std::int32_t block = set.begin; block < set.end; ++block) {
            const auto at = static_cast<std::size_t>(
                set.first_token / task.piece_tokens * task.row_blocks + block);
            ASSERT_FALSE(seen[static_cast<std::size_t>(t)].at(at));
            seen[static_cast<std::size_t>(t)][at] = true;
          }
          if (!is_first) continue;
          is_first = false;
          ASSERT_EQ(range.set_task, t);
          ASSERT_EQ(range.next_item, item);
          ASSERT_EQ(range.set.task.data, task.data);
          ASSERT_EQ(range.set.first_token, set.first_token);
          ASSERT_EQ(range.set.num_tokens, set.num_tokens);
          ASSERT_EQ(range.set.begin, set.begin);
          ASSERT_EQ(range.set.end, set.end);
        }
      }
      ASSERT_EQ(range.set.num_tokens == 0, is_first);
    }
    for (std::size_t t = 0; t < tasks.size(); ++t) {
      const auto& task = plan.tasks[t];
      ASSERT_EQ(next[t], task.num_items);
      ASSERT_EQ(task.num_items == 0, tasks[t].delta.data == nullptr || tasks[t].num_rows == 0);
      if (task.num_items == 0) continue;
      ASSERT_EQ(task.num_pieces, (task.num_rows + task.piece_tokens - 1) / task.piece_tokens);
      ASSERT_EQ(task.num_items, task.num_pieces * task.row_blocks);
    }
  }
}

TEST(SbmmPlanTest, RefusesAMatrixOfMoreThan4GiB) {
  const int dummy = 0;
  SbmmTask task;
  task.delta = {&dummy, DeltaType::kDenseInt8, 128, std::int64_t{1} << 20, 8192};
  task.num_rows = 1;
  SbmmPlan plan;
  EXPECT_THROW(make_sbmm_plan(plan, {&task, 1}, 132), InvalidArgument);
}

}  // namespace
}  // namespace deltazip::testing
