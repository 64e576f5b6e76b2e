#pragma once

// What each op is told: plain structs, already checked by Ops. Pointers are the backend's memory
// unless marked host. All matrices are contiguous and row-major.

#include <cstdint>

#include "deltazip/backend/delta_matrix.h"
#include "deltazip/base/dtype.h"

namespace deltazip {

// A base weight in the backend's own packing: [rows, columns] = [out_features, in_features].
struct PackedMatrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;  // of the stored elements
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

// y = x * weight^T. Decoupled from deltas: once for all rows of the batch.
struct LinearParams {
  const void* x;  // [num_rows, weight.columns]
  void* y;        // [num_rows, weight.rows]
  PackedMatrix weight;
  std::int64_t num_rows;
  DType dtype;    // of x
  DType y_dtype;  // dtype, or float32
};

// Rows [first_row, first_row + num_rows) of x times one delta, added to columns
// [out_offset, out_offset + delta.rows) of y. q, k and v of a segment are three tasks.
struct SbmmTask {
  DeltaMatrix delta;
  std::int32_t first_row = 0;
  std::int32_t num_rows = 0;
  std::int64_t out_offset = 0;
};

// All delta products of one layer in one launch. A row in no task gets no delta.
struct SbmmParams {
  const void* x;          // [num_rows, in_features]
  void* y;                // [num_rows, out_features], holds the base product, is added to
  const SbmmTask* tasks;  // host, [num_tasks]; no two tasks write the same element
  std::int32_t num_tasks;
  std::int64_t num_rows, in_features, out_features;
  DType dtype;    // of x
  DType y_dtype;  // dtype, or float32
};

// y = x * weight^T + the delta products: one projection of all variants of a batch.
struct ProjectParams {
  LinearParams base;
  SbmmParams deltas;  // the same x and y; maybe no tasks
};

// out = table[token] (+ delta[token] of the row's variant).
struct EmbedParams {
  const std::int32_t* tokens;            // host, [num_rows]; t < 0 stands for sampled[~t]
  PackedMatrix table;                    // [vocab_size, hidden_size]
  const DeltaMatrix* const* row_deltas;  // host, [num_rows] of pointers, nullptr: base only
  void* out;                             // [num_rows, hidden_size]
  std::int64_t num_rows;
  DType dtype;                  // of out
  const std::int32_t* sampled;  // tokens that the host may not know yet; or nullptr
};

// residual += x (when x is given); out = residual / rms(residual) * gain of the row.
struct RmsNormParams {
  const void* x;                  // [num_rows, hidden_size] or nullptr
  void* residual;                 // [num_rows, hidden_size], read and, when x is given, written
  void* out;                      // [num_rows, hidden_size]
  const float* const* row_gains;  // host, [num_rows] of pointers to [hidden_size]
  float epsilon;
  std::int64_t num_rows, hidden_size;
  DType dtype;
};

// y[row] += bias of the row; a row whose pointer is nullptr has none.
struct BiasAddParams {
  void* y;                         // [num_rows, size]
  const float* const* row_biases;  // host, [num_rows] of pointers to [size]
  std::int64_t num_rows, size;
  DType dtype;
};

// out = silu(gate) * up, gate_up = [gate | up].
struct SiluMulParams {
  const void* gate_up;  // [num_rows, 2 * size]
  void* out;            // [num_rows, size]
  std::int64_t num_rows, size;
  DType dtype;
};

// The KV cache of one layer: [num_blocks, num_kv_heads, block_size, head_dim], keys and values
// apart.
struct KvLayer {
  void* keys = nullptr;
  void* values = nullptr;
  std::int32_t num_blocks = 0, num_kv_heads = 0, block_size = 0, head_dim = 0;
  DType dtype = DType::kFloat32;

  bool operator==(const KvLayer&) const = default;
};

// Rotates q and k (rotate-half convention) and stores k and v at their slots of the cache.
struct RopeAppendParams {
  void* qkv;  // [num_rows, (num_heads + 2 * num_kv_heads) * head_dim]; q is rotated in place
  const float* cos_sin;             // [num_angles, head_dim]: head_dim / 2 cosines, then sines
  const std::int32_t* angle_rows;   // host, [num_rows] into cos_sin
  const std::int64_t* cache_slots;  // host, [num_rows]: block * block_size + offset; -1: no place,
                                    // k and v are not stored
  KvLayer cache;
  std::int64_t num_rows;
  std::int32_t num_heads;
  DType dtype;  // of qkv
};

// One sequence's part of a batch: its last num_rows positions, causal over context_length keys.
struct AttentionSequence {
  std::int32_t first_row = 0;
  std::int32_t num_rows = 0;             // queries in this step
  std::int32_t context_length = 0;       // keys, this step's own included
  const std::int32_t* blocks = nullptr;  // host, [ceil(context_length / block_size)]
};

struct PagedAttentionParams {
  const void* qkv;  // [num_rows, (num_heads + 2 * num_kv_heads) * head_dim], q rotated
  void* out;        // [num_rows, num_heads * head_dim]
  KvLayer cache;
  const AttentionSequence* sequences;  // host
  std::int32_t num_sequences;
  std::int32_t num_heads;
  float scale;
  std::int64_t num_rows;
  DType dtype;  // of qkv and out
};

// out[i] = x[rows[i]].
struct GatherRowsParams {
  const void* x;             // [num_x_rows, size]
  void* out;                 // [num_rows, size]
  const std::int32_t* rows;  // host
  std::int64_t num_rows, size;
  DType dtype;
};

struct TokenBias {
  std::int32_t token;
  float bias;
};

// How one row's next token is chosen. Pointers are host memory that lives through the call.
struct SamplingRow {
  float temperature = 1.0F;  // 0: greedy
  std::int32_t top_k = 0;    // 0: off
  float top_p = 1.0F;
  float min_p = 0.0F;
  float repetition_penalty = 1.0F;  // over prompt and output, as in CTRL (2019)
  float presence_penalty = 0.0F;    // over output only
  float frequency_penalty = 0.0F;   // over output only
  std::uint64_t seed = 0;
  std::uint64_t position = 0;  // of the token being chosen; with seed, the random draw
  const std::int32_t* prompt_tokens = nullptr;  // [num_prompt_tokens]
  std::int32_t num_prompt_tokens = 0;
  const std::int32_t* output_tokens = nullptr;  // [num_output_tokens]
  std::int32_t num_output_tokens = 0;
  const TokenBias* biases = nullptr;  // [num_biases]
  std::int32_t num_biases = 0;
  const std::int32_t* banned_tokens = nullptr;  // [num_banned_tokens], never chosen
  std::int32_t num_banned_tokens = 0;
  std::int32_t num_logprobs = -1;  // -1: none; 0: of the chosen token; k: k alternatives too
  std::int32_t forced_token = -1;  // >= 0: not sampled, only scored (prompt logprobs)
};

inline constexpr std::int32_t kMaxLogprobs = 20;

struct SampledToken {
  std::int32_t token = -1;
  float logprob = 0.0F;   // log-softmax of the raw logits, before penalties and temperature
  std::int32_t rank = 0;  // 1 for the most likely, of the raw logits
  std::int32_t num_top = 0;
  std::int32_t top_tokens[kMaxLogprobs];
  float top_logprobs[kMaxLogprobs];
  bool is_finite = true;  // false: the row's logits held NaN or +inf; token is not valid
};

struct SampleParams {
  const void* logits;       // [num_rows, vocab_size]
  const SamplingRow* rows;  // host
  SampledToken* out;        // host
  std::int64_t num_rows, vocab_size;
  DType dtype;           // of logits
  std::int32_t* tokens;  // [num_rows] or nullptr: the chosen ones, 0 where there is none
};

}  // namespace deltazip
