// How a delta becomes a variant: names resolved to pointers, once per load.

#include <map>
#include <string>

#include "deltazip/base/error.h"
#include "impl.h"
#include "tensors.h"

namespace deltazip {
namespace {

// The parts of one delta, by the names of one model.
class Binder {
 public:
  Binder(Backend& backend, const ModelConfig& config, const VariantWeights& base,
         const DeviceDelta& delta, VariantWeights& out)
      : backend_(backend), config_(config), base_(base), delta_(delta), out_(out) {}

  DeltaMatrix matrix(const std::string& name, std::int64_t rows, std::int64_t columns) const {
    const DeltaPart* part = delta_.find(name);
    if (part == nullptr || part->kind == DeltaKind::kUnchanged) return {};
    DZ_CHECK(part->kind == DeltaKind::kMatrix, "delta: tensor '", name,
             "' holds replaced values, expected a compressed difference");
    const DeltaMatrix matrix = delta_.matrix(*part);
    DZ_CHECK(matrix.rows == rows && matrix.columns == columns, "delta: tensor '", name, "' is [",
             matrix.rows, ", ", matrix.columns, "], the base has [", rows, ", ", columns, "]");
    return matrix;
  }

  // The delta's own values, or the base's.
  const float* vector(const std::string& name, std::int64_t size, const float* base) const {
    const DeltaPart* part = delta_.find(name);
    if (part == nullptr || part->kind == DeltaKind::kUnchanged) return base;
    DZ_CHECK(part->kind == DeltaKind::kReplaced, "delta: tensor '", name,
             "' is compressed, expected replaced values");
    DZ_CHECK(part->num_elements == size, "delta: tensor '", name, "' has ", part->num_elements,
             " values, the base has ", size);
    return delta_.replaced(*part);
  }

  struct Piece {
    std::string name;
    std::int64_t size;
  };
  // Vectors that a fused product needs side by side: copied together if any differs from the base.
  const float* fused(std::initializer_list<Piece> pieces, const float* base) {
    std::int64_t total = 0;
    bool changed = false;
    for (const Piece& piece : pieces) {
      changed = changed || vector(piece.name, piece.size, nullptr) != nullptr;
      total += piece.size;
    }
    if (!changed) return base;
    Buffer& buffer = out_.buffers.emplace_back(
        backend_.allocate(static_cast<std::size_t>(total) * sizeof(float)));
    auto* to = static_cast<float*>(buffer.data());
    for (const Piece& piece : pieces) {
      const float* from = vector(piece.name, piece.size, base);
      backend_.copy_on_device(to, from, static_cast<std::size_t>(piece.size) * sizeof(float),
                              stream());
      to += piece.size;
      base += piece.size;
    }
    return static_cast<const float*>(buffer.data());
  }

  void layer(std::int32_t index);
  void finish() {  // what was put side by side is there
    if (stream_) stream_->synchronize();
  }

 private:
  // Most models have no biases to fuse: then a load asks nothing of the device here.
  Stream& stream() {
    if (!stream_) stream_ = backend_.create_stream();
    return *stream_;
  }

  Backend& backend_;
  std::unique_ptr<Stream> stream_;
  const ModelConfig& config_;
  const VariantWeights& base_;
  const DeviceDelta& delta_;
  VariantWeights& out_;
};

void Binder::layer(std::int32_t index) {
  const std::int64_t hidden = config_.hidden_size, inner = config_.intermediate_size;
  const std::int64_t q_size = std::int64_t{config_.num_heads} * config_.head_dim;
  const std::int64_t kv_size = std::int64_t{config_.num_kv_heads} * config_.head_dim;
  const VariantLayer& base = base_.layers[static_cast<std::size_t>(index)];
  const auto at = [&](std::string_view suffix) { return layer_tensor(index, suffix); };

  VariantLayer& to = out_.layers.emplace_back();
  to.input_norm = vector(at("input_layernorm.weight"), hidden, base.input_norm);
  to.post_attention_norm =
      vector(at("post_attention_layernorm.weight"), hidden, base.post_attention_norm);
  to.q = matrix(at("self_attn.q_proj.weight"), q_size, hidden);
  to.k = matrix(at("self_attn.k_proj.weight"), kv_size, hidden);
  to.v = matrix(at("self_attn.v_proj.weight"), kv_size, hidden);
  to.o = matrix(at("self_attn.o_proj.weight"), hidden, q_size);
  to.gate = matrix(at("mlp.gate_proj.weight"), inner, hidden);
  to.up = matrix(at("mlp.up_proj.weight"), inner, hidden);
  to.down = matrix(at("mlp.down_proj.weight"), hidden, inner);
  if (config_.attention_bias) {
    to.qkv_bias = fused({{at("self_attn.q_proj.bias"), q_size},
                         {at("self_attn.k_proj.bias"), kv_size},
                         {at("self_attn.v_proj.bias"), kv_size}},
                        base.qkv_bias);
    to.o_bias = vector(at("self_attn.o_proj.bias"), hidden, base.o_bias);
  }
  if (config_.mlp_bias) {
    to.gate_up_bias = fused({{at("mlp.gate_proj.bias"), inner}, {at("mlp.up_proj.bias"), inner}},
                            base.gate_up_bias);
    to.down_bias = vector(at("mlp.down_proj.bias"), hidden, base.down_bias);
  }
}

}  // namespace

void Model::check_servable(const ModelConfig& config, const DeltaFile& file) {
  std::map<std::string_view, const ExpectedTensor*> by_name;
  const std::vector<ExpectedTensor> expected = expected_tensors(config);
  for (const ExpectedTensor& each : expected) by_name.emplace(each.name, &each);
  for (const DeltaTensor& tensor : file.tensors()) {
    if (tensor.kind == DeltaKind::kUnchanged || is_ignored(tensor.name)) continue;
    const auto it = by_name.find(tensor.name);
    DZ_CHECK(it != by_name.end(), "delta: tensor '", tensor.name, "' is not part of a ",
             config.architecture, " like the base");
    DZ_CHECK(!it->second->is_matrix || tensor.kind == DeltaKind::kMatrix, "delta: tensor '",
             tensor.name, "' holds replaced values; a matrix is served only as a compressed ",
             "difference");
    DZ_CHECK(it->second->is_matrix || tensor.kind == DeltaKind::kReplaced, "delta: tensor '",
             tensor.name, "' is compressed; a norm or bias is served only as replaced values");
  }
}

std::shared_ptr<const VariantWeights> Model::bind(const DeviceDelta& delta) const {
  const ModelConfig& config = impl_->config;
  const VariantWeights& base = impl_->weights.variant;
  auto out = std::make_shared<VariantWeights>();
  out->id = ++impl_->last_variant;
  out->host = delta.host;
  Binder binder(impl_->backend, config, base, delta, *out);
  for (std::int32_t i = 0; i < config.num_layers; ++i) binder.layer(i);
  out->final_norm = binder.vector(std::string(kFinalNorm), config.hidden_size, base.final_norm);
  out->embedding = binder.matrix(std::string(kEmbedding), config.vocab_size, config.hidden_size);
  // A tied lm_head that is a tensor of its own in the checkpoint has its own entry in the delta.
  const bool is_own_tensor = !impl_->weights.lm_head_is_embedding || delta.find(kLmHead) != nullptr;
  out->lm_head = is_own_tensor
                     ? binder.matrix(std::string(kLmHead), config.vocab_size, config.hidden_size)
                     : out->embedding;
  binder.finish();
  return out;
}

}  // namespace deltazip
