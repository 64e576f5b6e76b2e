#include "backend/cpu/cpu_ops.h"

#include <algorithm>
#include <cstring>

#include "backend/cpu/layout.h"
#include "backend/cpu/pack.h"
#include "deltazip/base/error.h"

namespace deltazip::cpu {
namespace {

// Waking a thread for less than this costs more than the work.
constexpr std::int64_t kMinFloatsPerChunk = 8192;
constexpr std::int64_t kMinMultipliesPerChunk = 1 << 17;
// x rows are copied this far apart, so that they do not share cache sets.
constexpr std::int64_t kRowPadding = 16;

void check_dtype(const char* op, DType dtype) {
  DZ_CHECK(dtype == DType::kFloat32, op, ": the CPU computes in float32, got ", name(dtype));
}

// The panels of one task for up to kSbmmMaxTokens of its rows.
struct SbmmPiece {
  const SbmmTask* task;
  std::int32_t first_row, num_rows;  // of the batch
  std::int64_t first_panel;          // in the numbering of all pieces
  std::int64_t num_panels;
};

}  // namespace

CpuOps::CpuOps(const Kernels& kernels, ThreadPool& pool)
    : kernels_(kernels),
      pool_(pool),
      scratch_(static_cast<std::size_t>(pool.num_threads())),
      sampler_scratch_(static_cast<std::size_t>(pool.num_threads())) {}

template <typename Body>
void CpuOps::for_rows(std::int64_t num_rows, std::int64_t floats_per_row, const Body& body) {
  const std::int64_t grain =
      std::max<std::int64_t>(1, kMinFloatsPerChunk / std::max<std::int64_t>(1, floats_per_row));
  if (num_rows <= grain) {
    body(0, num_rows);
  } else {
    pool_.parallel_for(num_rows, grain,
                       [&](std::int64_t first, std::int64_t last, int) { body(first, last); });
  }
}

void CpuOps::run(const EmbedParams& params, Stream&) {
  check_dtype("embed", params.dtype);
  const std::int64_t size = params.table.columns;
  for_rows(params.num_rows, size, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      float* out = static_cast<float*>(params.out) + row * size;
      std::int32_t token = params.tokens[row];
      if (token < 0) token = params.sampled[~token];
      read_weight_row(out, params.table, token);
      const DeltaMatrix* delta = params.row_deltas[row];
      if (delta != nullptr && delta->data != nullptr) add_delta_row(out, *delta, token);
    }
  });
}

void CpuOps::run(const LinearParams& params, Stream&) {
  check_dtype("linear", params.dtype);
  const std::int64_t columns = params.weight.columns;
  const std::int64_t num_panels = divide_up(params.weight.rows, kWeightPanelRows);
  const std::int64_t multiplies = kWeightPanelRows * columns * params.num_rows;
  const std::int64_t grain = divide_up(kMinMultipliesPerChunk, multiplies + 1);
  const std::int64_t scratch_floats = kernels_.linear_scratch_floats(columns);
  pool_.parallel_for(num_panels, grain, [&](std::int64_t first, std::int64_t last, int worker) {
    kernels_.linear(params, first, last,
                    scratch_[static_cast<std::size_t>(worker)].floats(scratch_floats));
  });
}

void CpuOps::run(const SbmmParams& params, Stream&) {
  check_dtype("sbmm", params.dtype);
  std::vector<SbmmPiece> pieces;
  std::int64_t num_panels = 0, kernel_floats = 0;
  for (std::int32_t t = 0; t < params.num_tasks; ++t) {
    const SbmmTask& task = params.tasks[t];
    if (task.delta.data == nullptr) continue;
    kernel_floats = std::max(kernel_floats, kernels_.sbmm_scratch_floats(task.delta));
    const std::int32_t num_pieces =
        static_cast<std::int32_t>(divide_up(task.num_rows, kSbmmMaxTokens));
    for (std::int32_t i = 0; i < num_pieces; ++i) {
      const std::int32_t begin = task.num_rows * i / num_pieces;
      const std::int32_t end = task.num_rows * (i + 1) / num_pieces;
      const std::int64_t panels = divide_up(task.delta.rows, kDeltaPanelRows);
      pieces.push_back({&task, task.first_row + begin, end - begin, num_panels, panels});
      num_panels += panels;
    }
  }
  if (pieces.empty()) return;
  const std::int64_t columns = params.in_features;
  const std::int64_t x_stride = align_up(columns, kDeltaBlockColumns) + kRowPadding;
  const std::int64_t x_floats = kSbmmMaxTokens * x_stride;
  const std::int64_t grain = divide_up(kMinMultipliesPerChunk, kDeltaPanelRows * columns);
  pool_.parallel_for(num_panels, grain, [&](std::int64_t first, std::int64_t last, int worker) {
    float* x = scratch_[static_cast<std::size_t>(worker)].floats(x_floats + kernel_floats);
    auto piece = std::upper_bound(
        pieces.begin(), pieces.end(), first,
        [](std::int64_t panel, const SbmmPiece& p) { return panel < p.first_panel; });
    std::int32_t staged_row = -1, staged_rows = 0;
    for (--piece; piece != pieces.end() && piece->first_panel < last; ++piece) {
      if (piece->first_row != staged_row || piece->num_rows != staged_rows) {
        staged_row = piece->first_row;
        staged_rows = piece->num_rows;
        for (std::int64_t r = 0; r < staged_rows; ++r) {
          float* to = x + r * x_stride;
          std::memcpy(to, static_cast<const float*>(params.x) + (staged_row + r) * columns,
                      sizeof(float) * static_cast<std::size_t>(columns));
          std::fill(to + columns, to + align_up(columns, kDeltaBlockColumns), 0.0F);
        }
        std::fill(x + staged_rows * x_stride, x + x_floats, 0.0F);
      }
      float* y = static_cast<float*>(params.y) + piece->first_row * params.out_features +
                 piece->task->out_offset;
      kernels_.sbmm({.delta = piece->task->delta,
                     .x = x,
                     .x_stride = x_stride,
                     .y = y,
                     .y_stride = params.out_features,
                     .num_tokens = piece->num_rows,
                     .first_panel = std::max(first, piece->first_panel) - piece->first_panel,
                     .last_panel = std::min(last - piece->first_panel, piece->num_panels)},
                    x + x_floats);
    }
  });
}

void CpuOps::run(const BiasAddParams& params, Stream&) {
  check_dtype("bias_add", params.dtype);
  for_rows(params.num_rows, params.size,
           [&](std::int64_t first, std::int64_t last) { kernels_.bias_add(params, first, last); });
}

void CpuOps::run(const RmsNormParams& params, Stream&) {
  check_dtype("rms_norm", params.dtype);
  for_rows(params.num_rows, params.hidden_size,
           [&](std::int64_t first, std::int64_t last) { kernels_.rms_norm(params, first, last); });
}

void CpuOps::run(const SiluMulParams& params, Stream&) {
  check_dtype("silu_mul", params.dtype);
  for_rows(params.num_rows, 2 * params.size,
           [&](std::int64_t first, std::int64_t last) { kernels_.silu_mul(params, first, last); });
}

void CpuOps::run(const RopeAppendParams& params, Stream&) {
  check_dtype("rope_append", params.dtype);
  const std::int64_t row_floats =
      (params.num_heads + 2 * params.cache.num_kv_heads) * params.cache.head_dim;
  for_rows(params.num_rows, row_floats, [&](std::int64_t first, std::int64_t last) {
    kernels_.rope_append(params, first, last);
  });
}

void CpuOps::run(const PagedAttentionParams& params, Stream&) {
  check_dtype("paged_attention", params.dtype);
  std::vector<AttentionItem> items;
  std::int64_t multiplies = 0;
  const std::int32_t group = params.num_heads / params.cache.num_kv_heads;
  for (std::int32_t s = 0; s < params.num_sequences; ++s) {
    const AttentionSequence& sequence = params.sequences[s];
    multiplies += std::int64_t{2} * sequence.num_rows * sequence.context_length * params.num_heads *
                  params.cache.head_dim;
    // Longest first: the last rows of a prompt see the most keys.
    for (std::int32_t end = sequence.num_rows; end > 0; end -= kAttentionMaxRows) {
      const std::int32_t first = std::max(0, end - kAttentionMaxRows);
      for (std::int32_t head = 0; head < params.cache.num_kv_heads; ++head) {
        items.push_back({&params, &sequence, head, first, end - first});
      }
    }
  }
  if (items.empty() || group == 0) return;
  const auto num_items = static_cast<std::int64_t>(items.size());
  const std::int64_t grain = divide_up(kMinMultipliesPerChunk, multiplies / num_items + 1);
  const std::int64_t scratch_floats = kernels_.attention_scratch_floats(params);
  pool_.parallel_for(num_items, grain, [&](std::int64_t first, std::int64_t last, int worker) {
    float* scratch = scratch_[static_cast<std::size_t>(worker)].floats(scratch_floats);
    for (std::int64_t i = first; i < last; ++i) {
      kernels_.attention(items[static_cast<std::size_t>(i)], scratch);
    }
  });
}

void CpuOps::run(const GatherRowsParams& params, Stream&) {
  const std::size_t row_bytes = static_cast<std::size_t>(params.size) * size_of(params.dtype);
  for_rows(params.num_rows, params.size, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      std::memcpy(static_cast<char*>(params.out) + static_cast<std::size_t>(row) * row_bytes,
                  static_cast<const char*>(params.x) +
                      static_cast<std::size_t>(params.rows[row]) * row_bytes,
                  row_bytes);
    }
  });
}

void CpuOps::run(const SampleParams& params, Stream&) {
  check_dtype("sample", params.dtype);
  const auto* logits = static_cast<const float*>(params.logits);
  const std::int64_t grain = std::max<std::int64_t>(1, kMinFloatsPerChunk / params.vocab_size);
  pool_.parallel_for(
      params.num_rows, grain, [&](std::int64_t first, std::int64_t last, int worker) {
        for (std::int64_t row = first; row < last; ++row) {
          params.out[row] =
              sample_row(kernels_, logits + row * params.vocab_size, params.vocab_size,
                         params.rows[row], sampler_scratch_[static_cast<std::size_t>(worker)]);
          if (params.tokens != nullptr) params.tokens[row] = std::max(params.out[row].token, 0);
        }
      });
}

}  // namespace deltazip::cpu
