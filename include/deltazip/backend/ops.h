#pragma once

#include <span>

#include "deltazip/backend/params.h"
#include "deltazip/base/tensor_view.h"

namespace deltazip {

class Stream;

// The mathematics of a model. A public op checks shapes and dtypes once, for every backend, then
// hands plain Params to the backend's run(). Host arrays are read before an op returns; what it
// writes to the host is there once the stream, or an event recorded after it, was synchronized
// with. Every op throws InvalidArgument on a mismatch, naming what was expected and what came.
class Ops {
 public:
  virtual ~Ops() = default;

  // A token t < 0 stands for sampled[~t], which lies on the device: sample() has put it there.
  void embed(TensorView out, std::span<const std::int32_t> tokens, const PackedMatrix& table,
             std::span<const DeltaMatrix* const> row_deltas, Stream& stream,
             std::span<const std::int32_t> sampled = {});
  // y is of x's dtype or float32, here and in the next two.
  void linear(TensorView y, ConstTensorView x, const PackedMatrix& weight, Stream& stream);
  void sbmm(TensorView y, ConstTensorView x, std::span<const SbmmTask> tasks, Stream& stream);
  // linear, then sbmm; a backend may merge the two.
  void project(TensorView y, ConstTensorView x, const PackedMatrix& weight,
               std::span<const SbmmTask> tasks, Stream& stream);
  void bias_add(TensorView y, std::span<const float* const> row_biases, Stream& stream);
  // x may be empty (data == nullptr): then residual is only normalised.
  void rms_norm(TensorView out, TensorView residual, ConstTensorView x,
                std::span<const float* const> row_gains, float epsilon, Stream& stream);
  void silu_mul(TensorView out, ConstTensorView gate_up, Stream& stream);
  // cos_sin: float32 [num_angles, head_dim]
  void rope_append(TensorView qkv, ConstTensorView cos_sin,
                   std::span<const std::int32_t> angle_rows,
                   std::span<const std::int64_t> cache_slots, const KvLayer& cache,
                   std::int32_t num_heads, Stream& stream);
  void paged_attention(TensorView out, ConstTensorView qkv, const KvLayer& cache,
                       std::span<const AttentionSequence> sequences, std::int32_t num_heads,
                       float scale, Stream& stream);
  void gather_rows(TensorView out, ConstTensorView x, std::span<const std::int32_t> rows,
                   Stream& stream);
  // `tokens`, on the device, gets the chosen tokens too, one for each row; empty: it does not.
  void sample(std::span<SampledToken> out, ConstTensorView logits,
              std::span<const SamplingRow> rows, Stream& stream,
              std::span<std::int32_t> tokens = {});

 protected:
  virtual void run(const EmbedParams& params, Stream& stream) = 0;
  virtual void run(const LinearParams& params, Stream& stream) = 0;
  virtual void run(const SbmmParams& params, Stream& stream) = 0;
  virtual void run(const ProjectParams& params, Stream& stream);
  virtual void run(const BiasAddParams& params, Stream& stream) = 0;
  virtual void run(const RmsNormParams& params, Stream& stream) = 0;
  virtual void run(const SiluMulParams& params, Stream& stream) = 0;
  virtual void run(const RopeAppendParams& params, Stream& stream) = 0;
  virtual void run(const PagedAttentionParams& params, Stream& stream) = 0;
  virtual void run(const GatherRowsParams& params, Stream& stream) = 0;
  virtual void run(const SampleParams& params, Stream& stream) = 0;
};

}  // namespace deltazip
