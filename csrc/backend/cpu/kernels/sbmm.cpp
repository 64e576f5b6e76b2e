// Delta products read from the packed words: 2:4 with integer values, and dense integers.
// A code is decoded once for all tokens of the item; group scales go onto the group's sum.

#include "backend/cpu/kernels/sbmm_lanes.h"
#include "backend/cpu/kernels/sbmm_tables.h"
#include "backend/cpu/kernels/table.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

// Ahead of the page at which the hardware's prefetcher stops.
constexpr std::int64_t kPrefetchBytes = 2048;

// One group of four: the two kept places and their levels.
struct KeptPair {
  NI index0, index1;
  NF level0, level1;
};

// Half a block: four groups, 16 columns.
template <DeltaType kType>
struct SparseHalf {
  NI values, indices;

  DZ_INLINE SparseHalf(const char* block, int half) {
    if constexpr (kType == DeltaType::kSparse24Int4) {
      values = n_load_words(block + half * kWordRowBytes);
      indices = n_load_words(block + 2 * kWordRowBytes);
    } else {
      values = n_load_words(block);
      indices = n_load_words(block + kWordRowBytes);
      if (half != 0) values = n_shift<16>(values);
    }
    if (half != 0) indices = n_shift<16>(indices);
  }
  template <int kGroup>
  DZ_INLINE KeptPair pair() const {
    KeptPair kept;
    kept.index0 = n_shift<4 * kGroup>(indices);
    kept.index1 = n_shift<4 * kGroup + 2>(indices);
    if constexpr (kType == DeltaType::kSparse24Int4) {
      kept.level0 = n_level4<8 * kGroup>(values);
      kept.level1 = n_level4<8 * kGroup + 4>(values);
    } else {
      kept.level0 = n_level2<4 * kGroup>(values);
      kept.level1 = n_level2<4 * kGroup + 2>(values);
    }
    return kept;
  }
};

template <DeltaType kType, int kTokens>
void sparse_panel(const char* panel, const DeltaLayout& layout, const SbmmItem& item, float* y,
                  std::int64_t num_valid) {
  alignas(64) float sums[kTokens][kLanes];
  for (int part = 0; part < kParts; ++part) {
    NF totals[kTokens];
    for (int t = 0; t < kTokens; ++t) totals[t] = n_zero();
    const char* block = panel + layout.scale_bytes + part * kNative * 4;
    const float* x = item.x;
    std::int64_t blocks_left = layout.num_blocks;
    for (std::int64_t group = 0; group < layout.num_groups; ++group) {
      NF first[kTokens], second[kTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) first[t] = second[t] = n_zero();
      const std::int64_t num_blocks =
          blocks_left < layout.blocks_per_group ? blocks_left : layout.blocks_per_group;
      blocks_left -= num_blocks;
      for (std::int64_t h = 0; h < 2 * num_blocks; ++h) {
        const int half = static_cast<int>(h % 2);
        const SparseHalf<kType> codes(block, half);
        __builtin_prefetch(block + kPrefetchBytes + half * kWordRowBytes);
        if (half != 0) __builtin_prefetch(block + kPrefetchBytes + 2 * kWordRowBytes);
        unroll<0, 4>([&]<int kGroup>() __attribute__((always_inline)) {
          const KeptPair kept = codes.template pair<kGroup>();
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            const auto four = n_broadcast4(x + t * item.x_stride + 4 * kGroup);
            first[t] = n_fma(n_pick(four, kept.index0), kept.level0, first[t]);
            second[t] = n_fma(n_pick(four, kept.index1), kept.level1, second[t]);
          }
        });
        block += half * layout.block_bytes;
        x += kDeltaBlockColumns / 2;
      }
      const NF scale = n_load_scales(panel + group * kScaleRowBytes + part * kNative * 2);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        totals[t] = n_fma(scale, n_add(first[t], second[t]), totals[t]);
      }
    }
    for (int t = 0; t < kTokens; ++t) n_store(sums[t] + part * kNative, totals[t]);
  }
  add_to_output(sums, item.num_tokens, y, item.y_stride, num_valid);
}

// A quarter of a dense block is 8 columns: one row of words at 4 bits.
constexpr int kQuarterColumns = 8;

template <DeltaType kType, int kColumn>
DZ_INLINE NF dense_level(const char* quarter) {
  if constexpr (kType == DeltaType::kDenseInt4) {
    return n_level4<4 * kColumn>(n_load_words(quarter));
  } else {
    return n_load_int8(quarter + kColumn * kDeltaPanelRows);
  }
}

template <DeltaType kType, int kTokens, int kPanels>
void dense_panels(const char* panel, const DeltaLayout& layout, const SbmmItem& item, float* y,
                  std::int64_t num_valid) {
  constexpr int kCodeBytes = kType == DeltaType::kDenseInt4 ? 4 : 1;
  alignas(64) float sums[kPanels][kTokens][kLanes];
  for (int part = 0; part < kParts; ++part) {
    NF totals[kPanels][kTokens];
    for (int p = 0; p < kPanels; ++p) {
      for (int t = 0; t < kTokens; ++t) totals[p][t] = n_zero();
    }
    const char* block = panel + layout.scale_bytes + part * kNative * kCodeBytes;
    const float* x = item.x;
    std::int64_t blocks_left = layout.num_blocks;
    for (std::int64_t group = 0; group < layout.num_groups; ++group) {
      NF group_sums[kPanels][kTokens];
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) group_sums[p][t] = n_zero();
      }
      const std::int64_t num_blocks =
          blocks_left < layout.blocks_per_group ? blocks_left : layout.blocks_per_group;
      blocks_left -= num_blocks;
      for (std::int64_t q = 0; q < 4 * num_blocks; ++q) {
        unroll<0, kQuarterColumns>([&]<int kColumn>() __attribute__((always_inline)) {
          NF levels[kPanels];
#pragma GCC unroll 8
          for (int p = 0; p < kPanels; ++p) {
            levels[p] = dense_level<kType, kColumn>(block + p * layout.panel_bytes);
          }
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            const NF value = n_set1(x[t * item.x_stride + kColumn]);
#pragma GCC unroll 8
            for (int p = 0; p < kPanels; ++p) {
              group_sums[p][t] = n_fma(value, levels[p], group_sums[p][t]);
            }
          }
        });
        block += layout.block_bytes / 4;
        x += kQuarterColumns;
      }
      for (int p = 0; p < kPanels; ++p) {
        const NF scale = n_load_scales(panel + p * layout.panel_bytes + group * kScaleRowBytes +
                                       part * kNative * 2);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          totals[p][t] = n_fma(scale, group_sums[p][t], totals[p][t]);
        }
      }
    }
    for (int p = 0; p < kPanels; ++p) {
      for (int t = 0; t < kTokens; ++t) n_store(sums[p][t] + part * kNative, totals[p][t]);
    }
  }
  for (int p = 0; p < kPanels; ++p) {
    add_to_output(sums[p], item.num_tokens, y + p * kLanes, item.y_stride, num_valid - p * kLanes);
  }
}

template <DeltaType kType, int kTokens>
void sweep(const SbmmItem& item) {
  const DeltaMatrix& delta = item.delta;
  const DeltaLayout layout = delta_layout(kType, delta.rows, delta.columns, delta.group_size);
  const char* data = static_cast<const char*>(delta.data);
  // Few tokens are few chains of sums: several panels at once hide the latency of the FMA.
  constexpr int kPanels = is_sparse24(kType) ? 1 : kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;
  std::int64_t panel = item.first_panel;
  if constexpr (kPanels > 1) {
    for (; panel + kPanels <= item.last_panel; panel += kPanels) {
      dense_panels<kType, kTokens, kPanels>(data + panel * layout.panel_bytes, layout, item,
                                            item.y + panel * kDeltaPanelRows,
                                            delta.rows - panel * kDeltaPanelRows);
    }
  }
  for (; panel < item.last_panel; ++panel) {
    const char* p = data + panel * layout.panel_bytes;
    float* y = item.y + panel * kDeltaPanelRows;
    const std::int64_t num_valid = delta.rows - panel * kDeltaPanelRows;
    if constexpr (is_sparse24(kType)) {
      sparse_panel<kType, kTokens>(p, layout, item, y, num_valid);
    } else {
      dense_panels<kType, kTokens, 1>(p, layout, item, y, num_valid);
    }
  }
}

template <DeltaType kType>
void sbmm_of(const SbmmItem& item) {
  with_tokens(item.num_tokens, [&]<int kTokens>() { sweep<kType, kTokens>(item); });
}

}  // namespace

void sbmm(const SbmmItem& item, float* scratch) {
  switch (item.delta.type) {
    case DeltaType::kSparse24Int4:
      return sbmm_of<DeltaType::kSparse24Int4>(item);
    case DeltaType::kSparse24Int2:
      return sbmm_of<DeltaType::kSparse24Int2>(item);
    case DeltaType::kSparse24Ternary:
      return sbmm_ternary(item, scratch);
    case DeltaType::kSparse14Sign:
      return sbmm_sign(item, scratch);
    case DeltaType::kDenseInt4:
      return sbmm_of<DeltaType::kDenseInt4>(item);
    case DeltaType::kDenseInt8:
      return sbmm_of<DeltaType::kDenseInt8>(item);
  }
}

std::int64_t sbmm_scratch_floats(const DeltaMatrix& delta) {
  if (!has_states(delta.type)) return 0;
  return kTableFloats + divide_up(delta.rows, kDeltaPanelRows) * kLanes * kSbmmMaxTokens;
}

}  // namespace deltazip::cpu::DZ_ISA
