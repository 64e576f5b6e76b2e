#pragma once

// Launches attention over a paged KV cache. No device code.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "deltazip/base/dtype.h"

namespace deltazip::cuda {

struct PagedAttentionArgs {
  const void* qkv;           // [num_rows, (num_heads + 2 * num_kv_heads) * head_dim]
  void* out;                 // [num_rows, num_heads * head_dim]
  const void* keys;          // [num_blocks, num_kv_heads, block_size, head_dim]
  const void* values;        // as keys
  const std::int32_t* plan;  // AttentionPlan::words()
  float* partial_sums;       // [partial_rows, head_dim]
  float* partial_softmax;    // [partial_rows, 2]: maximum, sum of weights
  std::uint32_t* counters;   // all zero before and after
  std::int32_t num_heads, num_kv_heads, block_size;
  float scale;  // positive
};

struct PagedAttentionLaunch {
  DType dtype;            // float16 or bfloat16: of qkv, out, keys and values
  std::int32_t head_dim;  // 64, 96, 128 or 256
  std::int32_t num_sms;
  bool may_prefill;  // the plan may hold prefill items
  bool may_decode = true;
};

bool is_attention_head_dim(std::int32_t head_dim);
// What a block of the kernels of this head_dim must be able to have.
std::size_t attention_shared_bytes(std::int32_t head_dim);

// Asks for the kernels' shared memory; before the first launch on a device, outside of graphs.
void prepare_paged_attention(DType dtype, std::int32_t head_dim);

void launch_paged_attention(const PagedAttentionArgs& args, const PagedAttentionLaunch& how,
                            cudaStream_t stream);

}  // namespace deltazip::cuda
