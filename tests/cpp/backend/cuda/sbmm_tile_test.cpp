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

// mma's A from registers and metadata, as mma_int8.cuh says: 16 rows of 64 columns (sparse) or 32.
using Tile = std::array<std::array<float, 64>, 16>;
struct LaneRegisters {
  std::array<std::uint32_t, 4> a;
  std::uint32_t metadata;
};

Tile expand(const std::array<LaneRegisters, 32>& lanes, bool is_sparse) {
  Tile out{};
  for (int lane = 0; lane < 32; ++lane) {
    const int q = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int t = i % 2, h = i / 2;
      const std::uint32_t word =
          lanes[static_cast<std::size_t>(lane)].a[static_cast<std::size_t>(i)];
      auto& row = out[static_cast<std::size_t>(q + 8 * t)];
      for (int k = 0; k < 4; ++k) {
        std::size_t column = static_cast<std::size_t>(16 * h + 4 * c + k);
        if (is_sparse) {
          const int group = 2 * c + k / 2;  // of the half
          const std::uint32_t nibble =
              lanes[static_cast<std::size_t>(4 * q + 2 * h + t)].metadata >> (4 * group) & 15u;
          EXPECT_LT(nibble & 3u, nibble >> 2) << "indices must ascend";
          column = static_cast<std::size_t>(32 * h + 4 * group) + (nibble >> (k % 2 * 2) & 3u);
        }
        row[column] = static_cast<std::int8_t>(word >> (8 * k) & 255u);
      }
    }
  }
  return out;
}

std::uint32_t word_at(const unsigned char* from, int index) {
  std::uint32_t word;
  std::memcpy(&word, from + 4 * index, 4);
  return word;
}

float unit_of(DeltaType type) {
  switch (type) {
    case DeltaType::kSparse24Int4:
    case DeltaType::kDenseInt4:
      return kInt4Unit;
    case DeltaType::kSparse24Int2:
      return kInt2Unit;
    case DeltaType::kSparse24Ternary:
      return kTernaryUnit;
    default:
      return kInt8Unit;
  }
}

// What a lane holds of ternary tile (r, y), by way of both exchanges.
LaneRegisters ternary_registers(const unsigned char* record, int r, int y, int lane) {
  const int pair = r / 2;
  const auto planes_of = [&](int other) {
    const int at = (pair * 32 + other) * 4;
    return TernaryPlanes{word_at(record, at), word_at(record, at + 1), word_at(record, at + 2)};
  };
  const auto exchanged = [&](int other) {
    return exchange_bytes(ternary_singles(planes_of(other)), ternary_singles(planes_of(other ^ 1)),
                          static_cast<std::uint32_t>(other));
  };
  const std::uint32_t singles = swap_inner_nibbles(
      exchange_halves(exchanged(lane), exchanged(lane ^ 2), static_cast<std::uint32_t>(lane)));
  const TernaryDigits digits =
      ternary_digits(word_at(record, (pair * 32 + lane) * 4 + 3),
                     word_at(record + kTernarySecondSigns, pair * 32 + lane), singles);
  std::uint32_t metadata[4];
  ternary_metadata(metadata, planes_of(lane));
  LaneRegisters out{{}, metadata[2 * y + r % 2]};
  for (int i = 0; i < 4; ++i) {
    out.a[static_cast<std::size_t>(i)] = ternary_bytes(digits.of[i / 2][r % 2], i % 2, y);
  }
  return out;
}

// What a lane holds of tile (r, y) of 64 columns, or of 32 of a dense type: the kernel's loads.
LaneRegisters registers(const unsigned char* record, DeltaType type, int r, int y, int lane) {
  const int pair = r / 2, e = 2 * y + r % 2, at = pair * 32 + lane;
  LaneRegisters out{};
  switch (type) {
    case DeltaType::kSparse24Int4:
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t word =
            word_at(record, ((2 * pair + y) * 32 + lane) * 4 + r % 2 * 2 + h);
        out.a[static_cast<std::size_t>(2 * h)] = int4_bytes(word, false);
        out.a[static_cast<std::size_t>(2 * h + 1)] = int4_bytes(word, true);
      }
      out.metadata = word_at(record + 2048, at * 4 + e);
      return out;
    case DeltaType::kSparse24Int2:
      for (int i = 0; i < 4; ++i) {
        out.a[static_cast<std::size_t>(i)] = int2_bytes(word_at(record, at * 4 + e), i);
      }
      out.metadata = word_at(record + 1024, at * 4 + e);
      return out;
    case DeltaType::kSparse24Ternary:
      return ternary_registers(record, r, y, lane);
    case DeltaType::kDenseInt4:
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t word = word_at(record, ((r * 4 + y) * 32 + lane) * 2 + h);
        out.a[static_cast<std::size_t>(2 * h)] = int4_bytes(word, false);
        out.a[static_cast<std::size_t>(2 * h + 1)] = int4_bytes(word, true);
      }
      return out;
    case DeltaType::kDenseInt8:
      for (int i = 0; i < 4; ++i) {
        out.a[static_cast<std::size_t>(i)] = word_at(record, ((r * 4 + y) * 32 + lane) * 4 + i);
      }
      return out;
    case DeltaType::kSparse14Sign:  // comes as ternary
      return out;
  }
  return out;
}

TEST_P(SbmmTileTest, ProductsSeeTheMatrix) {
  const bool is_sparse = is_sparse24(GetParam());
  const int columns = is_sparse ? 64 : 32;
  const double unit = unit_of(GetParam());
  for (const Shape& shape : kShapes) {
    const Delta delta(*cpu_, GetParam(), shape.rows, shape.columns, shape.group_size, rng_);
    const std::vector<unsigned char> tiled = tile(delta);
    const RecordLayout layout =
        record_layout(GetParam(), shape.rows, shape.columns, shape.group_size);
    for (std::int64_t n = 0; n < layout.row_blocks * layout.records; ++n) {
      const unsigned char* record = tiled.data() + n * layout.record_bytes;
      for (int r = 0; r < 4; ++r) {
        for (int y = 0; y < kRecordColumns / columns; ++y) {
          std::array<LaneRegisters, 32> lanes;
          for (int lane = 0; lane < 32; ++lane) {
            lanes[static_cast<std::size_t>(lane)] = registers(record, GetParam(), r, y, lane);
          }
          const Tile seen = expand(lanes, is_sparse);
          for (int i = 0; i < 16; ++i) {
            for (int k = 0; k < columns; ++k) {
              const std::int64_t row = n / layout.records * 64 + 16 * r + i;
              const std::int64_t column = n % layout.records * 128 + columns * y + k;
              const double value = seen[static_cast<std::size_t>(i)][static_cast<std::size_t>(k)] /
                                   unit * scale_at(record, layout, 16 * r + i, columns * y + k);
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
  ASSERT_LE(sum_bytes + std::int64_t{set.num_tokens} * x_place(task.records).pitch, kSharedBytes);
}

// Four tokens' rows of bytes are what ldmatrix reads at once: 16 bytes each, on banks of their own.
TEST(SbmmPlanTest, BytesOfFourTokensShareNoBank) {
  for (int records = 1; records < 300; ++records) {
    const XPlace place = x_place(records);
    ASSERT_GE(place.low_offset, records * kRecordColumns);
    ASSERT_GE(place.scales_offset, place.low_offset + records * kRecordColumns);
    ASSERT_GE(place.pitch, place.scales_offset + records * 4);
    ASSERT_EQ(place.pitch % 16 + place.scales_offset % 16, 0);
    std::array<bool, 8> taken{};
    for (int row = 0; row < 8; ++row) {
      const int at = row / 2 * place.pitch + row % 2 * place.low_offset;
      ASSERT_EQ(at % 16, 0);
      ASSERT_FALSE(taken[static_cast<std::size_t>(at / 16 % 8)]) << records << " records";
      taken[static_cast<std::size_t>(at / 16 % 8)] = true;
    }
  }
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

}  // namespace
}  // namespace deltazip::testing
