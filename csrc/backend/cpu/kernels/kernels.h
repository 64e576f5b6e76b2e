#pragma once

// What one ISA offers: each op on a range of its independent items, without threads or checks.
// Kernels use only the scratch they are given; plain types cross this border.

#include <cstdint>

#include "deltazip/backend/params.h"

namespace deltazip::cpu {

// Tokens that one pass of an SBMM kernel serves: their sums stay in registers.
inline constexpr int kSbmmMaxTokens = 8;
// Queries (rows x heads of a KV head) that one attention item takes at most.
inline constexpr int kAttentionMaxRows = 8;

struct SbmmItem {
  DeltaMatrix delta;
  const float* x;  // [kSbmmMaxTokens, x_stride]: zero from delta.columns to its multiple of 32, and
                   // in the rows from num_tokens on
  std::int64_t x_stride;  // in floats
  float* y;               // the task's first row and column
  std::int64_t y_stride;
  int num_tokens;  // 1 to kSbmmMaxTokens
  std::int64_t first_panel, last_panel;
};

// One KV head of one sequence, for a few of its rows.
struct AttentionItem {
  const PagedAttentionParams* params;
  const AttentionSequence* sequence;
  std::int32_t kv_head;
  std::int32_t first_row, num_rows;  // relative to the sequence
};

struct LogitSummary {
  float max;
  bool is_finite;  // no NaN, no +inf, and not all -inf
};

struct Kernels {
  const char* name;
  // Panels [first, last) of 32 output rows. scratch: linear_scratch_floats().
  void (*linear)(const LinearParams& params, std::int64_t first_panel, std::int64_t last_panel,
                 float* scratch);
  std::int64_t (*linear_scratch_floats)(std::int64_t columns);
  void (*sbmm)(const SbmmItem& item, float* scratch);
  std::int64_t (*sbmm_scratch_floats)(const DeltaMatrix& delta);
  // The rest on rows [first, last).
  void (*bias_add)(const BiasAddParams& params, std::int64_t first, std::int64_t last);
  void (*rms_norm)(const RmsNormParams& params, std::int64_t first, std::int64_t last);
  void (*silu_mul)(const SiluMulParams& params, std::int64_t first, std::int64_t last);
  void (*rope_append)(const RopeAppendParams& params, std::int64_t first, std::int64_t last);
  void (*attention)(const AttentionItem& item, float* scratch);
  std::int64_t (*attention_scratch_floats)(const PagedAttentionParams& params);
  LogitSummary (*summarise_logits)(const float* logits, std::int64_t size);
  // Lowest index of the largest value.
  std::int64_t (*argmax)(const float* values, std::int64_t size);
  std::int64_t (*count_greater)(const float* values, std::int64_t size, float bound);
  // out[i] = exp((values[i] - max) * inverse_temperature), if out is given; returns their sum.
  double (*exp_scaled)(float* out, const float* values, std::int64_t size, float max,
                       float inverse_temperature);
  // Indices of values greater than bound, ascending; returns how many.
  std::int64_t (*collect_greater)(std::int32_t* indices, const float* values, std::int64_t size,
                                  float bound);
};

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace deltazip::cpu
