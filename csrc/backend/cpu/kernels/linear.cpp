// y = x * weight^T over panels of 32 rows, weights widened to float in registers.
// Every output is one chain of fused multiply-adds over ascending k, whatever the batch.

#include "backend/cpu/kernels/table.h"
#include "backend/cpu/kernels/vec.h"
#include "backend/cpu/layout.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

#if defined(DZ_ISA_AVX512)
constexpr int kMaxRows = 12;       // x 2 vectors = 24 of 32 registers for sums
constexpr int kMaxWholeRows = 12;  // up to here both halves of a panel at once
#elif defined(DZ_ISA_AVX2)
constexpr int kMaxRows = 6;  // x 1 vector (2 ymm) = 12 of 16 registers
constexpr int kMaxWholeRows = 2;
#else
constexpr int kMaxRows = 3;
constexpr int kMaxWholeRows = 1;
#endif

// From this many rows on, x is copied into rows whose distance is no multiple of a page, or all of
// them would fall into the same cache sets.
constexpr std::int64_t kMinRowsToStage = 5;
constexpr std::int64_t kStagePadding = 16;
// The hardware's prefetcher stops at every page: 30 % at 4 rows and more. A single row reads faster
// than that without.
constexpr std::int64_t kPrefetchBytes = 2048;
constexpr std::int64_t kCachedPanelBytes = 512 << 10;  // panels kept in L2 while rows pass by

template <DType kType>
DZ_INLINE void load_weights(const char* p, F32& low, F32& high) {
  if constexpr (kType == DType::kBFloat16) {
    load_bfloat16_pairs(p, low, high);
  } else {
    low = load_as<kType>(p);
    high = load_as<kType>(p + 16 * kBytes<kType>);
  }
}

DZ_INLINE void store_sum(float* y, F32 sum, std::int64_t num_valid) {
  if (num_valid >= kLanes) {
    store(y, sum);
  } else if (num_valid > 0) {
    store_first(y, sum, static_cast<int>(num_valid));
  }
}

// kRows rows of x against kPanels panels; kHalf: -1 both halves of a panel, else 0 or 1.
template <DType kType, int kRows, int kPanels, int kHalf>
void multiply(const float* x, std::int64_t x_stride, std::int64_t columns, const char* weights,
              float* y, std::int64_t y_stride, std::int64_t num_valid) {
  constexpr int kVectors = kHalf < 0 ? 2 * kPanels : kPanels;
  const std::int64_t panel_bytes = weight_panel_bytes(kType, columns);
  F32 sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
  }
  for (std::int64_t k = 0; k < columns; ++k) {
    F32 w[kVectors];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
      F32 low, high;
      const char* column = weights + p * panel_bytes + k * 32 * kBytes<kType>;
      if constexpr (kRows > 1) __builtin_prefetch(column + kPrefetchBytes);
      load_weights<kType>(column, low, high);
      if constexpr (kHalf < 0) {
        w[2 * p] = low;
        w[2 * p + 1] = high;
      } else {
        w[p] = kHalf == 0 ? low : high;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F32 value = set1(x[r * x_stride + k]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(value, w[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t first = kHalf < 0 ? 16 * v : 32 * v + 16 * kHalf;
      store_sum(y + r * y_stride + first, sums[r][v], num_valid - first);
    }
  }
}

template <DType kType, int kRows>
void multiply_rows(const float* x, std::int64_t x_stride, const LinearParams& params,
                   std::int64_t first_panel, std::int64_t last_panel, float* y) {
  constexpr int kManyPanels =
      kRows > kMaxWholeRows ? 1 : (kRows == 1 ? 2 : 1) * (kMaxRows > 6 && kRows <= 3 ? 2 : 1);
  const std::int64_t columns = params.weight.columns, rows = params.weight.rows;
  const std::int64_t panel_bytes = weight_panel_bytes(kType, columns);
  const char* weights = static_cast<const char*>(params.weight.data);
  std::int64_t panel = first_panel;
  const auto run = [&]<int kPanels>() {
    const char* w = weights + panel * panel_bytes;
    float* out = y + panel * kWeightPanelRows;
    const std::int64_t num_valid = rows - panel * kWeightPanelRows;
    if constexpr (kRows <= kMaxWholeRows) {
      multiply<kType, kRows, kPanels, -1>(x, x_stride, columns, w, out, rows, num_valid);
    } else {
      multiply<kType, kRows, kPanels, 0>(x, x_stride, columns, w, out, rows, num_valid);
      multiply<kType, kRows, kPanels, 1>(x, x_stride, columns, w, out, rows, num_valid);
    }
  };
  if constexpr (kManyPanels > 1) {
    for (; panel + kManyPanels <= last_panel; panel += kManyPanels) {
      run.template operator()<kManyPanels>();
    }
  }
  for (; panel < last_panel; ++panel) run.template operator()<1>();
}

template <DType kType, int kRows = kMaxRows>
void dispatch_rows(int num_rows, const float* x, std::int64_t x_stride, const LinearParams& params,
                   std::int64_t first_panel, std::int64_t last_panel, float* y) {
  if constexpr (kRows > 0) {
    if (num_rows == kRows) {
      multiply_rows<kType, kRows>(x, x_stride, params, first_panel, last_panel, y);
    } else {
      dispatch_rows<kType, kRows - 1>(num_rows, x, x_stride, params, first_panel, last_panel, y);
    }
  }
}

template <DType kType>
void linear_of(const LinearParams& params, std::int64_t first_panel, std::int64_t last_panel,
               float* scratch) {
  const std::int64_t columns = params.weight.columns;
  const std::int64_t panels_at_once =
      divide_up(kCachedPanelBytes, weight_panel_bytes(kType, columns) + 1);
  const auto* x = static_cast<const float*>(params.x);
  auto* y = static_cast<float*>(params.y);
  const std::int64_t num_blocks = divide_up(params.num_rows, kMaxRows);
  for (std::int64_t panel = first_panel; panel < last_panel; panel += panels_at_once) {
    const std::int64_t end =
        panel + panels_at_once < last_panel ? panel + panels_at_once : last_panel;
    for (std::int64_t block = 0; block < num_blocks; ++block) {
      const std::int64_t row = params.num_rows * block / num_blocks;
      const std::int64_t num_rows = params.num_rows * (block + 1) / num_blocks - row;
      const float* block_x = x + row * columns;
      std::int64_t x_stride = columns;
      if (num_rows >= kMinRowsToStage) {
        x_stride = align_up(columns, kLanes) + kStagePadding;
        for (std::int64_t r = 0; r < num_rows; ++r) {
          std::memcpy(scratch + r * x_stride, block_x + r * columns,
                      sizeof(float) * static_cast<std::size_t>(columns));
        }
        block_x = scratch;
      }
      dispatch_rows<kType>(static_cast<int>(num_rows), block_x, x_stride, params, panel, end,
                           y + row * params.weight.rows);
    }
  }
}

}  // namespace

void linear(const LinearParams& params, std::int64_t first_panel, std::int64_t last_panel,
            float* scratch) {
  switch (params.weight.dtype) {
    case DType::kBFloat16:
      return linear_of<DType::kBFloat16>(params, first_panel, last_panel, scratch);
    case DType::kFloat16:
      return linear_of<DType::kFloat16>(params, first_panel, last_panel, scratch);
    default:
      return linear_of<DType::kFloat32>(params, first_panel, last_panel, scratch);
  }
}

std::int64_t linear_scratch_floats(std::int64_t columns) {
  return kMaxRows * (align_up(columns, kLanes) + kStagePadding);
}

}  // namespace deltazip::cpu::DZ_ISA
