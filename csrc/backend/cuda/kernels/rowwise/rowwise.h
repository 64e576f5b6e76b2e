#pragma once

// The kernels that treat every row for itself. Activations are float16 or bfloat16, arithmetic is
// float32, a result is rounded once. Pointers are of the device; matrices are 16-byte aligned.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "deltazip/backend/delta_matrix.h"
#include "deltazip/base/dtype.h"

namespace deltazip::cuda {

struct EmbedLaunch {
  // [num_rows]: t >= 0 is a token; t < 0 stands for sampled[~t], chosen on the device before.
  const std::int32_t* tokens;
  const std::int32_t* sampled;    // or nullptr, where no t is negative
  const void* table;              // [vocab_size, hidden_size]
  const DeltaMatrix* row_deltas;  // [num_rows]; data == nullptr: none. nullptr: no row has one
  void* out;                      // [num_rows, hidden_size]
  std::int64_t num_rows, hidden_size;
  DType dtype;  // of table and out
};
void launch_embed(const EmbedLaunch& params, cudaStream_t stream);

// residual += x, rounded to dtype; out = that / rms * gain. x == nullptr: residual is only read.
struct RmsNormLaunch {
  const void* x;                  // [num_rows, hidden_size] or nullptr
  void* residual;                 // [num_rows, hidden_size]
  void* out;                      // [num_rows, hidden_size]
  const float* const* row_gains;  // [num_rows] of [hidden_size], 16-byte aligned
  float epsilon;
  std::int64_t num_rows, hidden_size;
  DType dtype;
};
void launch_rms_norm(const RmsNormLaunch& params, cudaStream_t stream);

struct BiasAddLaunch {
  void* y;                         // [num_rows, size]
  const float* const* row_biases;  // [num_rows] of [size], 16-byte aligned; nullptr: none
  std::int64_t num_rows, size;
  DType dtype;
};
void launch_bias_add(const BiasAddLaunch& params, cudaStream_t stream);

// out = silu(gate) * up
struct SiluMulLaunch {
  const void* gate_up;  // [num_rows, 2 * size]
  void* out;            // [num_rows, size]
  std::int64_t num_rows, size;
  DType dtype;
};
void launch_silu_mul(const SiluMulLaunch& params, cudaStream_t stream);

// Rotates q in place; stores the rotated k, and v, at their slots. k in qkv stays as it is.
struct RopeAppendLaunch {
  void* qkv;                       // [num_rows, (num_heads + 2 * num_kv_heads) * head_dim]
  const float* cos_sin;            // [num_angles, head_dim]: head_dim / 2 cosines, then sines
  const std::int32_t* angle_rows;  // [num_rows]
  const std::int64_t*
      cache_slots;  // [num_rows]: block * block_size + offset; -1: nothing is stored
  void* keys;       // [num_blocks, num_kv_heads, block_size, head_dim]
  void* values;     // as keys
  std::int64_t num_rows;
  std::int32_t num_heads, num_kv_heads, block_size, head_dim;
  DType dtype;  // of qkv, keys and values
};
void launch_rope_append(const RopeAppendLaunch& params, cudaStream_t stream);

// out[i] = x[rows[i]], of any type.
struct GatherRowsLaunch {
  const void* x;
  void* out;                 // [num_rows, row_bytes]
  const std::int32_t* rows;  // [num_rows]
  std::int64_t num_rows, row_bytes;
};
void launch_gather_rows(const GatherRowsLaunch& params, cudaStream_t stream);

}  // namespace deltazip::cuda
