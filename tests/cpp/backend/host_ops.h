#pragma once

#include <cstdint>
#include <span>

#include "deltazip/backend/backend.h"

namespace deltazip::testing {

// What a product is rounded to: the backend's activation dtype, or not at all.
enum class Out : std::uint8_t { kActivation, kFloat32 };

// The ops on float32 matrices of the host, done when they return. A backend that shares the host's
// memory is called as it is. For any other each operand travels, in the dtype the model would use,
// to memory with NaN around it; what was written comes back, and what was not must be unchanged.
// Weights, deltas and KV caches are the backend's already.
class HostOps {
 public:
  explicit HostOps(Backend& backend) : backend_(backend) {}

  void embed(TensorView out, std::span<const std::int32_t> tokens, const PackedMatrix& table,
             std::span<const DeltaMatrix* const> row_deltas, Stream& stream);
  void linear(TensorView y, ConstTensorView x, const PackedMatrix& weight, Stream& stream,
              Out out = Out::kActivation);
  void sbmm(TensorView y, ConstTensorView x, std::span<const SbmmTask> tasks, Stream& stream,
            Out out = Out::kActivation);
  void project(TensorView y, ConstTensorView x, const PackedMatrix& weight,
               std::span<const SbmmTask> tasks, Stream& stream, Out out = Out::kActivation);
  void bias_add(TensorView y, std::span<const float* const> row_biases, Stream& stream);
  void rms_norm(TensorView out, TensorView residual, ConstTensorView x,
                std::span<const float* const> row_gains, float epsilon, Stream& stream);
  void silu_mul(TensorView out, ConstTensorView gate_up, Stream& stream);
  void rope_append(TensorView qkv, ConstTensorView cos_sin,
                   std::span<const std::int32_t> angle_rows,
                   std::span<const std::int64_t> cache_slots, const KvLayer& cache,
                   std::int32_t num_heads, Stream& stream);
  void paged_attention(TensorView out, ConstTensorView qkv, const KvLayer& cache,
                       std::span<const AttentionSequence> sequences, std::int32_t num_heads,
                       float scale, Stream& stream);
  void gather_rows(TensorView out, ConstTensorView x, std::span<const std::int32_t> rows,
                   Stream& stream);
  void sample(std::span<SampledToken> out, ConstTensorView logits,
              std::span<const SamplingRow> rows, Stream& stream);

 private:
  bool is_device() const { return !backend_.shares_host_memory(); }
  DType dtype() const { return backend_.activation_dtype(DType::kFloat32); }
  DType dtype(Out out) const { return out == Out::kFloat32 ? DType::kFloat32 : dtype(); }

  Backend& backend_;
};

}  // namespace deltazip::testing
