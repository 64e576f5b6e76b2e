// The ops that treat every row for itself.

#include <span>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/cuda_ops.h"
#include "backend/cuda/kernels/rowwise/rowwise.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

template <typename T>
std::span<const T> rows_of(const T* host, std::int64_t num_rows) {
  return {host, static_cast<std::size_t>(num_rows)};
}

}  // namespace

void CudaOps::run(const EmbedParams& params, Stream& stream) {
  CudaStream& queue = to_cuda(stream);
  embed_deltas_.clear();
  for (const DeltaMatrix* delta : rows_of(params.row_deltas, params.num_rows)) {
    embed_deltas_.push_back(delta != nullptr ? *delta : DeltaMatrix{});
  }
  const EmbedLaunch embed{.tokens = args_.put(rows_of(params.tokens, params.num_rows), queue),
                          .sampled = params.sampled,
                          .table = params.table.data,
                          .row_deltas = args_.put(std::span(std::as_const(embed_deltas_)), queue),
                          .out = params.out,
                          .num_rows = params.num_rows,
                          .hidden_size = params.table.columns,
                          .dtype = params.dtype};
  if (args_.launching()) launch_embed(embed, queue.get());
}

void CudaOps::run(const BiasAddParams& params, Stream& stream) {
  CudaStream& queue = to_cuda(stream);
  const BiasAddLaunch bias_add{
      .y = params.y,
      .row_biases = args_.put(rows_of(params.row_biases, params.num_rows), queue),
      .num_rows = params.num_rows,
      .size = params.size,
      .dtype = params.dtype};
  if (args_.launching()) launch_bias_add(bias_add, queue.get());
}

void CudaOps::run(const RmsNormParams& params, Stream& stream) {
  CudaStream& queue = to_cuda(stream);
  const RmsNormLaunch rms_norm{
      .x = params.x,
      .residual = params.residual,
      .out = params.out,
      .row_gains = args_.put(rows_of(params.row_gains, params.num_rows), queue),
      .epsilon = params.epsilon,
      .num_rows = params.num_rows,
      .hidden_size = params.hidden_size,
      .dtype = params.dtype};
  if (args_.launching()) launch_rms_norm(rms_norm, queue.get());
}

void CudaOps::run(const SiluMulParams& params, Stream& stream) {
  const SiluMulLaunch silu_mul{params.gate_up, params.out, params.num_rows, params.size,
                               params.dtype};
  if (args_.launching()) launch_silu_mul(silu_mul, to_cuda(stream).get());
}

void CudaOps::run(const RopeAppendParams& params, Stream& stream) {
  const KvLayer& cache = params.cache;
  DZ_CHECK(cache.dtype == params.dtype, "rope_append: on a CUDA device the KV cache must be ",
           name(params.dtype), " like qkv, got ", name(cache.dtype));
  CudaStream& queue = to_cuda(stream);
  const RopeAppendLaunch rope_append{
      .qkv = params.qkv,
      .cos_sin = params.cos_sin,
      .angle_rows = args_.put(rows_of(params.angle_rows, params.num_rows), queue),
      .cache_slots = args_.put(rows_of(params.cache_slots, params.num_rows), queue),
      .keys = cache.keys,
      .values = cache.values,
      .num_rows = params.num_rows,
      .num_heads = params.num_heads,
      .num_kv_heads = cache.num_kv_heads,
      .block_size = cache.block_size,
      .head_dim = cache.head_dim,
      .dtype = params.dtype};
  if (args_.launching()) launch_rope_append(rope_append, queue.get());
}

void CudaOps::run(const GatherRowsParams& params, Stream& stream) {
  CudaStream& queue = to_cuda(stream);
  const GatherRowsLaunch gather_rows{
      .x = params.x,
      .out = params.out,
      .rows = args_.put(rows_of(params.rows, params.num_rows), queue),
      .num_rows = params.num_rows,
      .row_bytes = params.size * static_cast<std::int64_t>(size_of(params.dtype))};
  if (args_.launching()) launch_gather_rows(gather_rows, queue.get());
}

}  // namespace deltazip::cuda
