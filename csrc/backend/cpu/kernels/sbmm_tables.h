#pragma once

// Delta products by table: four columns have few possible signed sums. Per token they are tabulated
// once and shared by all output rows, so a row's code is an address (as in T-MAC, 2024).

#include "backend/cpu/kernels/sbmm_lanes.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

// Tables of a slab of blocks stay in the first-level cache while all panels pass by.
constexpr int kTableFloats = 4096;

// `Codes`: kType, kStates, make_sums(x, sums), a constructor from a cell's two rows and the part,
// code<group>() and look_up(sums, code). scratch: sbmm_scratch_floats().
template <typename Codes, int kTokens>
void sweep_tables(const SbmmItem& item, float* scratch) {
  constexpr int kStates = Codes::kStates, kBlockFloats = 8 * kStates * kTokens;
  constexpr std::int64_t kSlabBlocks = kTableFloats / kBlockFloats;
  const DeltaMatrix& delta = item.delta;
  const DeltaLayout layout =
      delta_layout(Codes::kType, delta.rows, delta.columns, delta.group_size);
  const char* data = static_cast<const char*>(delta.data);
  const std::int64_t num_panels = item.last_panel - item.first_panel;
  float* tables = scratch;                 // [block of slab][group][token][state]
  float* totals = scratch + kTableFloats;  // [panel][token][16]
  std::memset(totals, 0, sizeof(float) * static_cast<std::size_t>(num_panels * kTokens * kLanes));

  for (std::int64_t slab = 0; slab < layout.num_blocks; slab += kSlabBlocks) {
    const std::int64_t slab_end =
        slab + kSlabBlocks < layout.num_blocks ? slab + kSlabBlocks : layout.num_blocks;
    for (std::int64_t g = 0; g < 8 * (slab_end - slab); ++g) {
      for (int t = 0; t < kTokens; ++t) {
        Codes::make_sums(item.x + t * item.x_stride + slab * kDeltaBlockColumns + 4 * g,
                         tables + (g * kTokens + t) * kStates);
      }
    }
    for (std::int64_t panel = 0; panel < num_panels; ++panel) {
      for (int part = 0; part < kParts; ++part) {
        float* part_totals = totals + panel * kTokens * kLanes + part * kNative;
        NF sums[kTokens];
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) sums[t] = n_load(part_totals + t * kLanes);
        for (std::int64_t block = slab; block < slab_end; ++block) {
          const std::int64_t cell = block * layout.num_panels + item.first_panel + panel;
          const Codes codes(data + cell * layout.cell_bytes,
                            data + layout.masks_offset + cell * kMaskRowBytes, part);
          const float* table = tables + (block - slab) * kBlockFloats;
          NF even[kTokens], odd[kTokens];
          unroll<0, 4>([&]<int kPair>() __attribute__((always_inline)) {
            const auto code0 = codes.template code<2 * kPair>();
            const auto code1 = codes.template code<2 * kPair + 1>();
            const float* pair_table = table + 2 * kPair * kTokens * kStates;
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
              const NF sum0 = Codes::look_up(pair_table + t * kStates, code0);
              const NF sum1 = Codes::look_up(pair_table + (kTokens + t) * kStates, code1);
              even[t] = kPair == 0 ? sum0 : n_add(even[t], sum0);
              odd[t] = kPair == 0 ? sum1 : n_add(odd[t], sum1);
            }
          });
          const std::int64_t group = block / layout.blocks_per_group;
          const NF scale = n_load_scales(data + layout.scales_offset +
                                         (group * layout.num_panels + item.first_panel + panel) *
                                             kScaleRowBytes +
                                         part * kNative * 2);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) sums[t] = n_fma(scale, n_add(even[t], odd[t]), sums[t]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) n_store(part_totals + t * kLanes, sums[t]);
      }
    }
  }
  for (std::int64_t panel = 0; panel < num_panels; ++panel) {
    alignas(64) float sums[kTokens][kLanes];
    std::memcpy(sums, totals + panel * kTokens * kLanes, sizeof(sums));
    const std::int64_t first_row = (item.first_panel + panel) * kDeltaPanelRows;
    add_to_output(sums, item.num_tokens, item.y + first_row, item.y_stride, delta.rows - first_row);
  }
}

}  // namespace
}  // namespace deltazip::cpu::DZ_ISA
