#include "deltazip/model/model.h"

#include <algorithm>
#include <cmath>

#include "deltazip/base/error.h"
#include "impl.h"
#include "padding.h"
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

std::int64_t length_of(const ModelSizes& sizes, const ModelConfig& config) {
  return sizes.max_length == 0 ? config.max_length() : sizes.max_length;
}

void check_sizes(const ModelSizes& sizes) {
  DZ_CHECK(sizes.max_batch_tokens > 0 && sizes.max_logit_rows > 0 && sizes.max_length >= 0,
           "Model: expected max_batch_tokens and max_logit_rows above 0 and max_length of 0 or "
           "more, got ",
           sizes.max_batch_tokens, ", ", sizes.max_logit_rows, ", ", sizes.max_length);
}

}  // namespace

struct Model::Impl::Scratch {
  Activations full;
  TensorView last_residual, last_normed, logits;  // [logit_rows, ...]
  std::span<std::int32_t> sampled;                // [logit_rows]
  std::vector<Buffer> buffers;
  std::size_t num_bytes = 0;

  // Without `allocates` it only counts the bytes.
  Scratch(Backend& backend, const ModelConfig& config, DType dtype, const ModelSizes& sizes,
          bool allocates) {
    const auto make_of = [&](DType type, std::int64_t rows, std::int64_t columns) {
      TensorView view{nullptr, type, {rows, columns}};
      num_bytes += view.num_bytes();
      if (allocates) view.data = buffers.emplace_back(backend.allocate(view.num_bytes())).data();
      return view;
    };
    const auto make = [&](std::int64_t rows, std::int64_t columns) {
      return make_of(dtype, rows, columns);
    };
    const std::int32_t decode_rows =
        rows_with_padding(backend, std::min(sizes.max_batch_tokens, sizes.max_logit_rows));
    const std::int64_t rows = std::max(sizes.max_batch_tokens, decode_rows);
    const std::int64_t logit_rows = std::max(sizes.max_logit_rows, decode_rows);
    const std::int64_t hidden = config.hidden_size, inner = config.intermediate_size;
    const std::int64_t q_size = std::int64_t{config.num_heads} * config.head_dim;
    const std::int64_t kv_size = std::int64_t{config.num_kv_heads} * config.head_dim;
    full = {make(rows, hidden), make(rows, hidden),
            make(rows, hidden), make(rows, q_size + 2 * kv_size),
            make(rows, q_size), make(rows, 2 * inner),
            make(rows, inner)};
    last_residual = make(logit_rows, hidden);
    last_normed = make(logit_rows, hidden);
    logits = make_of(DType::kFloat32, logit_rows, config.vocab_size);
    const TensorView tokens = make_of(DType::kInt32, logit_rows, 1);
    sampled = {static_cast<std::int32_t*>(tokens.data), static_cast<std::size_t>(logit_rows)};
  }

  Activations of(std::int64_t rows) const {
    return {first_rows(full.residual, rows), first_rows(full.normed, rows),
            first_rows(full.block, rows),    first_rows(full.qkv, rows),
            first_rows(full.attended, rows), first_rows(full.gate_up, rows),
            first_rows(full.inner, rows)};
  }
  // Fewer rows, whose residuals and attention are to be gathered here: qkv is read no more.
  Activations last_of(std::int64_t rows) const {
    Activations a = of(rows);
    a.residual = first_rows(last_residual, rows);
    a.attended = {full.qkv.data, full.qkv.dtype, {rows, full.attended.size(1)}};
    return a;
  }
};

Model::Impl::Impl(Backend& backend_in, const Checkpoint& checkpoint, const ModelConfig& config_in,
                  const ModelSizes& sizes_in)
    : backend(backend_in),
      config(config_in),
      sizes(sizes_in),
      weights(load_base_weights(backend_in, checkpoint, config_in, /*measures_only=*/false)),
      rope(backend_in, config, length_of(sizes, config), sizes.max_batch_tokens,
           *backend_in.create_stream()),
      plan(config, sizes.max_batch_tokens, sizes.max_logit_rows),
      scratch(std::make_unique<Scratch>(backend, config,
                                        backend.activation_dtype(weights.embedding.dtype), sizes,
                                        /*allocates=*/true)) {}

Model::Impl::~Impl() = default;

ConstTensorView Model::Impl::forward(const Batch& batch, KvCache& cache, Stream& stream) {
  plan.check(batch, sizes.max_batch_tokens, sizes.max_logit_rows);
  const auto num_rows = static_cast<std::int32_t>(batch.tokens.size());
  const std::int32_t num_padded = is_decode(batch) ? backend.padded_rows(num_rows) : 0;
  if (num_padded == 0) {
    plan.build(batch);
    const auto angle_rows = rope.rows(batch.positions, batch.rope_lengths, stream);
    backend.run_once(stream, [&] { run_decoder(batch, angle_rows, cache, stream); });
  } else {
    pad_decode(batch, num_padded, &weights.variant, padded);
    run_padded(padded_task_capacity(batch, &weights.variant), cache, stream);
  }
  return first_rows(scratch->logits, static_cast<std::int64_t>(batch.logit_rows.size()));
}

void Model::Impl::run_padded(std::int32_t task_capacity, KvCache& cache, Stream& stream) {
  plan.build(padded, task_capacity);
  const auto angle_rows = rope.rows(padded.positions, padded.rope_lengths, stream);
  const auto num_rows = static_cast<std::int32_t>(padded.tokens.size());
  backend.run_step({num_rows, task_capacity, generation_of(cache), 0}, stream,
                   [&] { run_decoder(padded, angle_rows, cache, stream); });
}

void Model::Impl::rehearse_decode(std::int32_t num_rows, std::int32_t num_variants, KvCache& cache,
                                  Stream& stream) {
  const std::int32_t num_padded = backend.padded_rows(num_rows);
  if (num_padded == 0) return;
  constexpr int kTimesUntilRecorded = 2;
  for (int i = 0; i < kTimesUntilRecorded; ++i) {
    pad_decode({}, num_padded, &weights.variant, padded);
    run_padded(task_capacity_for(num_variants), cache, stream);
    stream.synchronize();
  }
}

ConstTensorView Model::Impl::rehearse_prefill(std::int32_t num_rows, KvCache& cache,
                                              Stream& stream) {
  Batch batch;
  pad_decode({}, num_rows, &weights.variant, batch);
  batch.sequences.resize(1);
  batch.logit_rows = {num_rows - 1};
  const ConstTensorView logits = forward(batch, cache, stream);
  stream.synchronize();
  return logits;
}

// Equal keys of steps promise equal pointers, those of the cache included.
std::int32_t Model::Impl::generation_of(const KvCache& cache) {
  bool is_same = !last_cache.empty();
  last_cache.resize(static_cast<std::size_t>(config.num_layers));
  for (std::int32_t i = 0; i < config.num_layers; ++i) {
    KvLayer& last = last_cache[static_cast<std::size_t>(i)];
    is_same = is_same && last == cache.layer(i);
    last = cache.layer(i);
  }
  if (!is_same) ++cache_generation;
  return cache_generation;
}

void Model::Impl::run_decoder(const Batch& batch, std::span<const std::int32_t> angle_rows,
                              const KvCache& cache, Stream& stream) {
  const auto num_rows = static_cast<std::int64_t>(batch.tokens.size());
  const auto num_logit_rows = static_cast<std::int64_t>(batch.logit_rows.size());
  Activations a = scratch->of(num_rows);
  const RowPlan* rows = &plan.rows();
  const float scale = 1.0F / std::sqrt(static_cast<float>(config.head_dim));
  Ops& ops = backend.ops();

  ops.embed(a.residual, batch.tokens, weights.embedding, plan.embeddings(), stream,
            scratch->sampled);
  ConstTensorView added;  // what the block before has yet to add to the residual
  for (std::int32_t i = 0; i < config.num_layers; ++i) {
    const BaseLayer& layer = weights.layers[static_cast<std::size_t>(i)];
    const KvLayer& kv = cache.layer(i);
    ops.rms_norm(a.normed, a.residual, added, rows->vectors(i, &VariantLayer::input_norm),
                 config.rms_norm_epsilon, stream);
    ops.project(a.qkv, a.normed, layer.qkv, rows->tasks(i, Product::kQkv), stream);
    if (config.attention_bias) {
      ops.bias_add(a.qkv, rows->vectors(i, &VariantLayer::qkv_bias), stream);
    }
    ops.rope_append(a.qkv, rope.angles(), angle_rows, batch.cache_slots, kv, config.num_heads,
                    stream);
    // Of rows without logits nobody reads what the last layer makes, only their keys and values.
    const bool is_last = i + 1 == config.num_layers;
    if (is_last && num_logit_rows == 0) return;
    ops.paged_attention(a.attended, a.qkv, kv, batch.sequences, config.num_heads, scale, stream);
    if (is_last && num_logit_rows < num_rows) {
      const Activations few = scratch->last_of(num_logit_rows);
      ops.gather_rows(few.residual, a.residual, batch.logit_rows, stream);
      ops.gather_rows(few.attended, a.attended, batch.logit_rows, stream);
      a = few;
      rows = &plan.logit_rows();
    }
    ops.project(a.block, a.attended, layer.o, rows->tasks(i, Product::kO), stream);
    if (config.attention_bias) {
      ops.bias_add(a.block, rows->vectors(i, &VariantLayer::o_bias), stream);
    }

    ops.rms_norm(a.normed, a.residual, a.block,
                 rows->vectors(i, &VariantLayer::post_attention_norm), config.rms_norm_epsilon,
                 stream);
    ops.project(a.gate_up, a.normed, layer.gate_up, rows->tasks(i, Product::kGateUp), stream);
    if (config.mlp_bias) {
      ops.bias_add(a.gate_up, rows->vectors(i, &VariantLayer::gate_up_bias), stream);
    }
    ops.silu_mul(a.inner, a.gate_up, stream);
    ops.project(a.block, a.inner, layer.down, rows->tasks(i, Product::kDown), stream);
    if (config.mlp_bias) {
      ops.bias_add(a.block, rows->vectors(i, &VariantLayer::down_bias), stream);
    }
    added = a.block;
  }
  make_logits(a.residual, a.block, stream);
}

// [logit_rows, hidden] each.
void Model::Impl::make_logits(TensorView residual, ConstTensorView block, Stream& stream) {
  const std::int64_t num_rows = residual.size(0);
  const TensorView normed = first_rows(scratch->last_normed, num_rows);
  backend.ops().rms_norm(normed, residual, block, plan.final_norms(), config.rms_norm_epsilon,
                         stream);
  backend.ops().project(first_rows(scratch->logits, num_rows), normed, weights.lm_head,
                        plan.lm_head_tasks(), stream);
}

Model::Model(Backend& backend, const Checkpoint& checkpoint, const ModelConfig& config,
             const ModelSizes& sizes) {
  check_sizes(sizes);
  impl_ = std::make_unique<Impl>(backend, checkpoint, config, sizes);
}

ModelBytes Model::measure(Backend& backend, const Checkpoint& checkpoint, const ModelConfig& config,
                          const ModelSizes& sizes) {
  check_sizes(sizes);
  const BaseWeights weights =
      load_base_weights(backend, checkpoint, config, /*measures_only=*/true);
  const Impl::Scratch scratch(backend, config, backend.activation_dtype(weights.embedding.dtype),
                              sizes, /*allocates=*/false);
  return {weights.num_bytes,
          scratch.num_bytes +
              RopeTable::bytes_for(config, length_of(sizes, config), sizes.max_batch_tokens)};
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

std::span<std::int32_t> Model::sampled() const { return impl_->scratch->sampled; }

void Model::rehearse_decode(std::int32_t num_rows, std::int32_t num_variants, KvCache& cache,
                            Stream& stream) {
  impl_->rehearse_decode(num_rows, num_variants, cache, stream);
}

ConstTensorView Model::rehearse_prefill(std::int32_t num_rows, KvCache& cache, Stream& stream) {
  return impl_->rehearse_prefill(num_rows, cache, stream);
}

}  // namespace deltazip
