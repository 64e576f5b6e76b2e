#include "backend/host_ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "backend/device_memory.h"

namespace deltazip::testing {
namespace {

// A matrix's copy on the device. What no copy can be made of (a refusal's operand) goes as it is.
template <typename View>
class Operand {
 public:
  Operand(Backend& backend, Stream& stream, View host, DType dtype) : host_(host), view_(host) {
    if (host.data == nullptr || host.dtype != DType::kFloat32) return;
    view_.dtype = dtype;
    sent_ = to_bytes(
        {static_cast<const float*>(host.data), static_cast<std::size_t>(host.num_elements())},
        dtype);
    buffer_.emplace(backend, stream, sent_.size());
    buffer_->upload(sent_);
    view_.data = buffer_->data();
  }
  View view() const { return view_; }

  // After the op: results come back, what was only read must be as it was.
  void finish() const {
    if (!buffer_) return;
    EXPECT_TRUE(buffer_->guards_intact()) << "written outside of a matrix " << host_.shape.str();
    const std::vector<std::byte> bytes = buffer_->download();
    if constexpr (std::is_same_v<View, TensorView>) {
      std::ranges::copy(to_floats(bytes, view_.dtype), static_cast<float*>(host_.data));
    } else {
      EXPECT_TRUE(bytes == sent_) << "an input " << host_.shape.str() << " was written";
    }
  }

 private:
  View host_, view_;
  std::vector<std::byte> sent_;
  std::optional<GuardedBuffer> buffer_;
};

// Vectors that rows point to, each on the device once.
class RowVectors {
 public:
  RowVectors(Backend& backend, Stream& stream, std::span<const float* const> rows,
             std::int64_t size) {
    for (const float* row : rows) {
      auto& buffer = vectors_[row];
      if (row != nullptr && buffer == nullptr) {
        const auto bytes = std::as_bytes(std::span(row, static_cast<std::size_t>(size)));
        buffer = std::make_unique<GuardedBuffer>(backend, stream, bytes.size());
        buffer->upload(bytes);
      }
      rows_.push_back(buffer == nullptr ? nullptr : static_cast<const float*>(buffer->data()));
    }
  }
  std::span<const float* const> rows() const { return rows_; }

 private:
  std::map<const float*, std::unique_ptr<GuardedBuffer>> vectors_;
  std::vector<const float*> rows_;
};

template <typename... Operands>
void finish(Stream& stream, const Operands&... operands) {
  stream.synchronize();
  (operands.finish(), ...);
}

}  // namespace

void HostOps::embed(TensorView out, std::span<const std::int32_t> tokens, const PackedMatrix& table,
                    std::span<const DeltaMatrix* const> row_deltas, Stream& stream) {
  if (!is_device()) return backend_.ops().embed(out, tokens, table, row_deltas, stream);
  const Operand to(backend_, stream, out, dtype());
  backend_.ops().embed(to.view(), tokens, table, row_deltas, stream);
  finish(stream, to);
}

void HostOps::linear(TensorView y, ConstTensorView x, const PackedMatrix& weight, Stream& stream,
                     Out out) {
  if (!is_device()) return backend_.ops().linear(y, x, weight, stream);
  const Operand to(backend_, stream, y, dtype(out));
  const Operand from(backend_, stream, x, dtype());
  backend_.ops().linear(to.view(), from.view(), weight, stream);
  finish(stream, to, from);
}

void HostOps::sbmm(TensorView y, ConstTensorView x, std::span<const SbmmTask> tasks, Stream& stream,
                   Out out) {
  if (!is_device()) return backend_.ops().sbmm(y, x, tasks, stream);
  const Operand to(backend_, stream, y, dtype(out));
  const Operand from(backend_, stream, x, dtype());
  backend_.ops().sbmm(to.view(), from.view(), tasks, stream);
  finish(stream, to, from);
}

void HostOps::project(TensorView y, ConstTensorView x, const PackedMatrix& weight,
                      std::span<const SbmmTask> tasks, Stream& stream, Out out) {
  if (!is_device()) return backend_.ops().project(y, x, weight, tasks, stream);
  const Operand to(backend_, stream, y, dtype(out));
  const Operand from(backend_, stream, x, dtype());
  backend_.ops().project(to.view(), from.view(), weight, tasks, stream);
  finish(stream, to, from);
}

void HostOps::bias_add(TensorView y, std::span<const float* const> row_biases, Stream& stream) {
  if (!is_device()) return backend_.ops().bias_add(y, row_biases, stream);
  const Operand to(backend_, stream, y, dtype());
  const RowVectors biases(backend_, stream, row_biases, y.size(1));
  backend_.ops().bias_add(to.view(), biases.rows(), stream);
  finish(stream, to);
}

void HostOps::rms_norm(TensorView out, TensorView residual, ConstTensorView x,
                       std::span<const float* const> row_gains, float epsilon, Stream& stream) {
  if (!is_device()) return backend_.ops().rms_norm(out, residual, x, row_gains, epsilon, stream);
  const Operand to(backend_, stream, out, dtype());
  const Operand sum(backend_, stream, residual, dtype());
  const Operand from(backend_, stream, x, dtype());
  const RowVectors gains(backend_, stream, row_gains, residual.size(1));
  backend_.ops().rms_norm(to.view(), sum.view(), from.view(), gains.rows(), epsilon, stream);
  finish(stream, to, sum, from);
}

void HostOps::silu_mul(TensorView out, ConstTensorView gate_up, Stream& stream) {
  if (!is_device()) return backend_.ops().silu_mul(out, gate_up, stream);
  const Operand to(backend_, stream, out, dtype());
  const Operand from(backend_, stream, gate_up, dtype());
  backend_.ops().silu_mul(to.view(), from.view(), stream);
  finish(stream, to, from);
}

void HostOps::rope_append(TensorView qkv, ConstTensorView cos_sin,
                          std::span<const std::int32_t> angle_rows,
                          std::span<const std::int64_t> cache_slots, const KvLayer& cache,
                          std::int32_t num_heads, Stream& stream) {
  if (!is_device()) {
    return backend_.ops().rope_append(qkv, cos_sin, angle_rows, cache_slots, cache, num_heads,
                                      stream);
  }
  const Operand rotated(backend_, stream, qkv, dtype());
  const Operand angles(backend_, stream, cos_sin, DType::kFloat32);
  backend_.ops().rope_append(rotated.view(), angles.view(), angle_rows, cache_slots, cache,
                             num_heads, stream);
  finish(stream, rotated, angles);
}

void HostOps::paged_attention(TensorView out, ConstTensorView qkv, const KvLayer& cache,
                              std::span<const AttentionSequence> sequences, std::int32_t num_heads,
                              float scale, Stream& stream) {
  if (!is_device()) {
    return backend_.ops().paged_attention(out, qkv, cache, sequences, num_heads, scale, stream);
  }
  const Operand to(backend_, stream, out, dtype());
  const Operand from(backend_, stream, qkv, dtype());
  backend_.ops().paged_attention(to.view(), from.view(), cache, sequences, num_heads, scale,
                                 stream);
  finish(stream, to, from);
}

void HostOps::gather_rows(TensorView out, ConstTensorView x, std::span<const std::int32_t> rows,
                          Stream& stream) {
  if (!is_device()) return backend_.ops().gather_rows(out, x, rows, stream);
  const Operand to(backend_, stream, out, dtype());
  const Operand from(backend_, stream, x, dtype());
  backend_.ops().gather_rows(to.view(), from.view(), rows, stream);
  finish(stream, to, from);
}

void HostOps::sample(std::span<SampledToken> out, ConstTensorView logits,
                     std::span<const SamplingRow> rows, Stream& stream) {
  if (!is_device()) return backend_.ops().sample(out, logits, rows, stream);
  const Operand from(backend_, stream, logits, DType::kFloat32);
  backend_.ops().sample(out, from.view(), rows, stream);
  finish(stream, from);
}

}  // namespace deltazip::testing
