#include "deltazip/model/model.h"

#include <cmath>

#include "deltazip/base/error.h"
#include "impl.h"
#include "tensors.h"

namespace deltazip {
namespace {

// Activations of one step, reused by every layer. Each holds the most rows a step may have.
struct Activations {
  TensorView residual;  // [rows, hidden]
  TensorView normed;    // [rows, hidden]
  TensorView block;     // [rows, hidden]: what attention or the MLP adds to the residual
  TensorView qkv;       // [rows, q_size + 2 * kv_size]
  TensorView attended;  // [rows, q_size]
  TensorView gate_up;   // [rows, 2 * inner]
  TensorView inner;     // [rows, inner]
};

TensorView first_rows(TensorView view, std::int64_t rows) {
  return {view.data, view.dtype, {rows, view.size(1)}};
}

}  // namespace

struct Model::Impl::Scratch {
  Activations full;
  TensorView last_residual, last_block, last_normed, logits;  // [logit_rows, ...]
  std::vector<Buffer> buffers;
  std::size_t num_bytes = 0;

  Scratch(Backend& backend, const ModelConfig& config, DType dtype, std::int64_t max_rows,
          std::int64_t max_logit_rows) {
    const auto make = [&](std::int64_t rows, std::int64_t columns) {
      TensorView view{nullptr, dtype, {rows, columns}};
      num_bytes += view.num_bytes();
      view.data = buffers.emplace_back(backend.allocate(view.num_bytes())).data();
      return view;
    };
    const std::int64_t hidden = config.hidden_size, inner = config.intermediate_size;
    const std::int64_t q_size = std::int64_t{config.num_heads} * config.head_dim;
    const std::int64_t kv_size = std::int64_t{config.num_kv_heads} * config.head_dim;
    full = {make(max_rows, hidden), make(max_rows, hidden),
            make(max_rows, hidden), make(max_rows, q_size + 2 * kv_size),
            make(max_rows, q_size), make(max_rows, 2 * inner),
            make(max_rows, inner)};
    last_residual = make(max_logit_rows, hidden);
    last_block = make(max_logit_rows, hidden);
    last_normed = make(max_logit_rows, hidden);
    logits = make(max_logit_rows, config.vocab_size);
  }

  Activations of(std::int64_t rows) const {
    return {first_rows(full.residual, rows), first_rows(full.normed, rows),
            first_rows(full.block, rows),    first_rows(full.qkv, rows),
            first_rows(full.attended, rows), first_rows(full.gate_up, rows),
            first_rows(full.inner, rows)};
  }
};

Model::Impl::Impl(Backend& backend_in, const Checkpoint& checkpoint, const ModelConfig& config_in,
                  std::int32_t max_batch_tokens, std::int32_t max_logit_rows,
                  std::int64_t max_length)
    : backend(backend_in),
      config(config_in),
      weights(load_base_weights(backend_in, checkpoint, config_in)),
      rope(backend_in, config, max_length == 0 ? config.max_length() : max_length, max_batch_tokens,
           *backend_in.create_stream()),
      plan(config, max_batch_tokens, max_logit_rows),
      scratch(std::make_unique<Scratch>(backend_in, config,
                                        backend_in.activation_dtype(weights.embedding.dtype),
                                        max_batch_tokens, max_logit_rows)) {}

Model::Impl::~Impl() = default;

void Model::Impl::project(TensorView y, ConstTensorView x, const PackedMatrix& weight,
                          std::span<const SbmmTask> tasks, Stream& stream) {
  backend.ops().linear(y, x, weight, stream);
  if (!tasks.empty()) backend.ops().sbmm(y, x, tasks, stream);
}

ConstTensorView Model::Impl::forward(const Batch& batch, KvCache& cache, Stream& stream) {
  plan.build(batch);
  const std::span<const std::int32_t> angle_rows =
      rope.rows(batch.positions, batch.rope_lengths, stream);
  const auto num_rows = static_cast<std::int64_t>(batch.tokens.size());
  const Activations a = scratch->of(num_rows);
  const float scale = 1.0F / std::sqrt(static_cast<float>(config.head_dim));
  Ops& ops = backend.ops();

  ops.embed(a.residual, batch.tokens, weights.embedding, plan.embeddings(), stream);
  ConstTensorView added;  // what the block before has yet to add to the residual
  for (std::int32_t i = 0; i < config.num_layers; ++i) {
    const BaseLayer& layer = weights.layers[static_cast<std::size_t>(i)];
    const KvLayer& kv = cache.layer(i);
    ops.rms_norm(a.normed, a.residual, added, plan.vectors(i, &VariantLayer::input_norm),
                 config.rms_norm_epsilon, stream);
    project(a.qkv, a.normed, layer.qkv, plan.tasks(i, Product::kQkv), stream);
    if (config.attention_bias) {
      ops.bias_add(a.qkv, plan.vectors(i, &VariantLayer::qkv_bias), stream);
    }
    ops.rope_append(a.qkv, rope.angles(), angle_rows, batch.cache_slots, kv, config.num_heads,
                    stream);
    // Nobody reads what the last layer makes of these rows, only their keys and values.
    if (i + 1 == config.num_layers && batch.logit_rows.empty()) break;
    ops.paged_attention(a.attended, a.qkv, kv, batch.sequences, config.num_heads, scale, stream);
    project(a.block, a.attended, layer.o, plan.tasks(i, Product::kO), stream);
    if (config.attention_bias) {
      ops.bias_add(a.block, plan.vectors(i, &VariantLayer::o_bias), stream);
    }

    ops.rms_norm(a.normed, a.residual, a.block, plan.vectors(i, &VariantLayer::post_attention_norm),
                 config.rms_norm_epsilon, stream);
    project(a.gate_up, a.normed, layer.gate_up, plan.tasks(i, Product::kGateUp), stream);
    if (config.mlp_bias) {
      ops.bias_add(a.gate_up, plan.vectors(i, &VariantLayer::gate_up_bias), stream);
    }
    ops.silu_mul(a.inner, a.gate_up, stream);
    project(a.block, a.inner, layer.down, plan.tasks(i, Product::kDown), stream);
    if (config.mlp_bias) {
      ops.bias_add(a.block, plan.vectors(i, &VariantLayer::down_bias), stream);
    }
    added = a.block;
  }
  return logits(batch, a.residual, a.block, stream);
}

ConstTensorView Model::Impl::logits(const Batch& batch, TensorView residual, TensorView block,
                                    Stream& stream) {
  const auto num_rows = static_cast<std::int64_t>(batch.logit_rows.size());
  const TensorView out = first_rows(scratch->logits, num_rows);
  if (num_rows == 0) return out;
  Ops& ops = backend.ops();
  if (num_rows < residual.size(0)) {
    const TensorView gathered_residual = first_rows(scratch->last_residual, num_rows);
    const TensorView gathered_block = first_rows(scratch->last_block, num_rows);
    ops.gather_rows(gathered_residual, residual, batch.logit_rows, stream);
    ops.gather_rows(gathered_block, block, batch.logit_rows, stream);
    residual = gathered_residual;
    block = gathered_block;
  }
  const TensorView normed = first_rows(scratch->last_normed, num_rows);
  ops.rms_norm(normed, residual, block, plan.final_norms(), config.rms_norm_epsilon, stream);
  project(out, normed, weights.lm_head, plan.lm_head_tasks(), stream);
  return out;
}

Model::Model(Backend& backend, const Checkpoint& checkpoint, const ModelConfig& config,
             std::int32_t max_batch_tokens, std::int32_t max_logit_rows, std::int64_t max_length) {
  DZ_CHECK(max_batch_tokens > 0 && max_logit_rows > 0 && max_length >= 0,
           "Model: expected max_batch_tokens and max_logit_rows above 0 and max_length of 0 or "
           "more, got ",
           max_batch_tokens, ", ", max_logit_rows, ", ", max_length);
  impl_ = std::make_unique<Impl>(backend, checkpoint, config, max_batch_tokens, max_logit_rows,
                                 max_length);
}

Model::~Model() = default;

const ModelConfig& Model::config() const { return impl_->config; }
std::size_t Model::weight_bytes() const { return impl_->weights.num_bytes; }
std::size_t Model::scratch_bytes() const {
  return impl_->scratch->num_bytes + impl_->rope.num_bytes();
}
const VariantWeights* Model::base() const { return &impl_->weights.variant; }

std::vector<BaseTensor> Model::base_tensors(const Checkpoint& checkpoint) {
  std::vector<BaseTensor> out;
  for (const SafetensorsEntry& entry : checkpoint.tensors()) {
    out.push_back({entry.name, entry.view.shape});
  }
  return out;
}

ConstTensorView Model::forward(const Batch& batch, KvCache& cache, Stream& stream) {
  return impl_->forward(batch, cache, stream);
}

}  // namespace deltazip
