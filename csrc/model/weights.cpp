#include "weights.h"

#include <cstring>
#include <span>

#include "deltazip/base/error.h"
#include "tensors.h"

namespace deltazip {
namespace {

void to_float32(ConstTensorView in, float* out) {
  const std::int64_t count = in.num_elements();
  const auto convert = [&](const auto* from) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = to_float(from[i]);
  };
  switch (in.dtype) {
    case DType::kFloat32:
      std::memcpy(out, in.data, in.num_bytes());
      return;
    case DType::kFloat16:
      return convert(static_cast<const Half*>(in.data));
    case DType::kBFloat16:
      return convert(static_cast<const BFloat16*>(in.data));
    default:
      detail::fail<InternalError>("to_float32 of ", name(in.dtype));
  }
}

// Reads tensors of the checkpoint, stacks them by rows, and puts them on the device.
class Loader {
 public:
  Loader(Backend& backend, const Checkpoint& checkpoint, BaseWeights& out, bool measures_only)
      : backend_(backend),
        checkpoint_(checkpoint),
        out_(out),
        measures_only_(measures_only),
        stream_(backend.create_stream()) {}

  PackedMatrix matrix(std::initializer_list<std::string> names) {
    std::vector<ConstTensorView> parts;
    for (const std::string& each : names) parts.push_back(checkpoint_.find(each)->view);

    // Parts of different precision meet in float32, which holds them all exactly.
    DType dtype = parts[0].dtype;
    std::int64_t rows = 0;
    for (const ConstTensorView& part : parts) {
      if (part.dtype != dtype) dtype = DType::kFloat32;
      rows += part.size(0);
    }
    const std::int64_t columns = parts[0].size(1);
    const DType packed_dtype = backend_.packed_dtype(dtype);
    Buffer buffer = allocate(backend_.packed_bytes(dtype, rows, columns));
    if (measures_only_) return {nullptr, packed_dtype, rows, columns};

    const ConstTensorView stacked = parts.size() == 1 ? parts[0] : stack(parts, dtype, rows);
    backend_.pack_weight(buffer.data(), stacked, *stream_);
    stream_->synchronize();  // the staging memory is used again
    PackedMatrix packed{buffer.data(), packed_dtype, rows, columns};
    out_.buffers.push_back(std::move(buffer));
    return packed;
  }

  const float* vector(std::initializer_list<std::string> names) {
    std::int64_t size = 0;
    for (const std::string& each : names) size += checkpoint_.find(each)->view.num_elements();
    Buffer buffer = allocate(static_cast<std::size_t>(size) * sizeof(float));
    if (measures_only_) return nullptr;

    std::vector<float> host;
    for (const std::string& each : names) {
      const ConstTensorView view = checkpoint_.find(each)->view;
      const std::size_t begin = host.size();
      host.resize(begin + static_cast<std::size_t>(view.num_elements()));
      to_float32(view, host.data() + begin);
    }
    backend_.copy_to_device(buffer.data(), host.data(), host.size() * sizeof(float), *stream_);
    stream_->synchronize();
    const float* data = static_cast<const float*>(buffer.data());
    out_.buffers.push_back(std::move(buffer));
    return data;
  }

 private:
  Buffer allocate(std::size_t num_bytes) {
    out_.num_bytes += num_bytes;
    return measures_only_ ? Buffer() : backend_.allocate(num_bytes);
  }

  ConstTensorView stack(std::span<const ConstTensorView> parts, DType dtype, std::int64_t rows) {
    const std::int64_t columns = parts[0].size(1);
    const ConstTensorView all{nullptr, dtype, {rows, columns}};
    staging_.resize(all.num_bytes());
    std::byte* at = staging_.data();
    for (const ConstTensorView& part : parts) {
      if (part.dtype == dtype) {
        std::memcpy(at, part.data, part.num_bytes());
      } else {
        to_float32(part, reinterpret_cast<float*>(at));
      }
      at += static_cast<std::size_t>(part.num_elements()) * size_of(dtype);
    }
    return {staging_.data(), dtype, {rows, columns}};
  }

  Backend& backend_;
  const Checkpoint& checkpoint_;
  BaseWeights& out_;
  const bool measures_only_;
  std::unique_ptr<Stream> stream_;
  std::vector<std::byte> staging_;
};

}  // namespace

BaseWeights load_base_weights(Backend& backend, const Checkpoint& checkpoint,
                              const ModelConfig& config, bool measures_only) {
  check_tensors(checkpoint, config);
  BaseWeights out;
  out.lm_head_is_embedding = lm_head_is_embedding(checkpoint, config);
  Loader load(backend, checkpoint, out, measures_only);

  out.embedding = load.matrix({std::string(kEmbedding)});
  out.lm_head = out.lm_head_is_embedding ? out.embedding : load.matrix({std::string(kLmHead)});
  out.variant.final_norm = load.vector({std::string(kFinalNorm)});
  for (std::int32_t i = 0; i < config.num_layers; ++i) {
    const auto at = [&](std::string_view suffix) { return layer_tensor(i, suffix); };
    BaseLayer& layer = out.layers.emplace_back();
    layer.qkv = load.matrix({at("self_attn.q_proj.weight"), at("self_attn.k_proj.weight"),
                             at("self_attn.v_proj.weight")});
    layer.o = load.matrix({at("self_attn.o_proj.weight")});
    layer.gate_up = load.matrix({at("mlp.gate_proj.weight"), at("mlp.up_proj.weight")});
    layer.down = load.matrix({at("mlp.down_proj.weight")});

    VariantLayer& vectors = out.variant.layers.emplace_back();
    vectors.input_norm = load.vector({at("input_layernorm.weight")});
    vectors.post_attention_norm = load.vector({at("post_attention_layernorm.weight")});
    if (config.attention_bias) {
      vectors.qkv_bias = load.vector(
          {at("self_attn.q_proj.bias"), at("self_attn.k_proj.bias"), at("self_attn.v_proj.bias")});
      vectors.o_bias = load.vector({at("self_attn.o_proj.bias")});
    }
    if (config.mlp_bias) {
      vectors.gate_up_bias = load.vector({at("mlp.gate_proj.bias"), at("mlp.up_proj.bias")});
      vectors.down_bias = load.vector({at("mlp.down_proj.bias")});
    }
  }
  return out;
}

}  // namespace deltazip
