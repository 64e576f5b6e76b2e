#include "model/tiny_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "io/safetensors_builder.h"
#include "model/rope.h"
#include "model/tensors.h"

namespace deltazip::test {
namespace {

constexpr std::uint32_t kVocabSize = 61;

using Matrix = std::vector<std::vector<double>>;  // rows

std::string bytes_of(const TinyTensor& tensor, DType dtype) {
  std::string out(tensor.values.size() * size_of(dtype), '\0');
  for (std::size_t i = 0; i < tensor.values.size(); ++i) {
    const float value = tensor.values[i];
    if (dtype == DType::kFloat32) {
      std::memcpy(out.data() + 4 * i, &value, 4);
    } else {
      const std::uint16_t bits =
          dtype == DType::kBFloat16 ? to_bfloat16(value).bits : to_half(value).bits;
      std::memcpy(out.data() + 2 * i, &bits, 2);
    }
  }
  return out;
}

Matrix product(const Matrix& x, const TinyTensor& weight, const TinyTensor* bias) {
  const auto rows = static_cast<std::size_t>(weight.shape[0]);
  const auto columns = static_cast<std::size_t>(weight.shape[1]);
  Matrix y(x.size(), std::vector<double>(rows, 0.0));
  for (std::size_t t = 0; t < x.size(); ++t) {
    for (std::size_t n = 0; n < rows; ++n) {
      double sum = bias == nullptr ? 0.0 : bias->values[n];
      for (std::size_t k = 0; k < columns; ++k) sum += weight.values[n * columns + k] * x[t][k];
      y[t][n] = sum;
    }
  }
  return y;
}

Matrix norm(const Matrix& x, const TinyTensor& gain, double epsilon) {
  Matrix y = x;
  for (std::vector<double>& row : y) {
    double sum = 0.0;
    for (const double value : row) sum += value * value;
    const double scale = 1.0 / std::sqrt(sum / static_cast<double>(row.size()) + epsilon);
    for (std::size_t i = 0; i < row.size(); ++i) row[i] *= scale * gain.values[i];
  }
  return y;
}

void add(Matrix& to, const Matrix& from) {
  for (std::size_t t = 0; t < to.size(); ++t) {
    for (std::size_t i = 0; i < to[t].size(); ++i) to[t][i] += from[t][i];
  }
}

void rotate(Matrix& x, const ModelConfig& config) {
  const Rope rope(config);
  const auto head_dim = static_cast<std::size_t>(config.head_dim), half = head_dim / 2;
  std::vector<float> angles(head_dim);
  for (std::size_t t = 0; t < x.size(); ++t) {
    rope.write_angles(static_cast<std::int64_t>(t), static_cast<std::int64_t>(x.size()), angles);
    for (std::size_t head = 0; head < x[t].size(); head += head_dim) {
      for (std::size_t i = 0; i < half; ++i) {
        const double a = x[t][head + i], b = x[t][head + half + i];
        x[t][head + i] = a * angles[i] - b * angles[half + i];
        x[t][head + half + i] = b * angles[i] + a * angles[half + i];
      }
    }
  }
}

Matrix attend(const Matrix& q, const Matrix& k, const Matrix& v, const ModelConfig& config) {
  const auto head_dim = static_cast<std::size_t>(config.head_dim);
  const auto group = static_cast<std::size_t>(config.num_heads / config.num_kv_heads);
  Matrix out(q.size(), std::vector<double>(q[0].size(), 0.0));
  for (std::size_t t = 0; t < q.size(); ++t) {
    for (std::size_t head = 0; head < static_cast<std::size_t>(config.num_heads); ++head) {
      const std::size_t at = head * head_dim, kv_at = head / group * head_dim;
      std::vector<double> weights(t + 1);
      double total = 0.0;
      for (std::size_t s = 0; s <= t; ++s) {
        double dot = 0.0;
        for (std::size_t i = 0; i < head_dim; ++i) dot += q[t][at + i] * k[s][kv_at + i];
        weights[s] = std::exp(dot / std::sqrt(static_cast<double>(head_dim)));
        total += weights[s];
      }
      for (std::size_t s = 0; s <= t; ++s) {
        for (std::size_t i = 0; i < head_dim; ++i) {
          out[t][at + i] += weights[s] / total * v[s][kv_at + i];
        }
      }
    }
  }
  return out;
}

}  // namespace

std::vector<std::int32_t> random_tokens(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> out(count);
  for (std::int32_t& token : out) token = static_cast<std::int32_t>(draw(random, kVocabSize));
  return out;
}

float rounded(float value, DType dtype) {
  if (dtype == DType::kBFloat16) return to_float(to_bfloat16(value));
  if (dtype == DType::kFloat16) return to_float(to_half(value));
  return value;
}

TinyModel make_tiny_model(const std::string& patch, std::uint32_t seed) {
  nlohmann::json json = {{"architectures", {"LlamaForCausalLM"}},
                         {"vocab_size", kVocabSize},
                         {"hidden_size", 32},
                         {"intermediate_size", 48},
                         {"num_hidden_layers", 2},
                         {"num_attention_heads", 4},
                         {"num_key_value_heads", 2},
                         {"max_position_embeddings", 128},
                         {"rms_norm_eps", 1e-5},
                         {"dtype", "float32"},
                         {"eos_token_id", 2}};
  json.update(nlohmann::json::parse(patch));
  TinyModel model;
  model.config_json = json.dump();
  model.config = ModelConfig::parse(model.config_json);
  model.dtype = model.config.dtype;

  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (const ExpectedTensor& tensor : expected_tensors(model.config)) {
    if (tensor.is_optional) continue;
    const bool is_norm = tensor.name.ends_with("norm.weight");
    const float scale =
        tensor.is_matrix ? 1.5F / std::sqrt(static_cast<float>(tensor.shape[1])) : 0.3F;
    TinyTensor& out = model.tensors[tensor.name];
    out.shape = tensor.shape;
    for (std::int64_t i = 0; i < tensor.shape.num_elements(); ++i) {
      out.values.push_back(rounded((is_norm ? 1.0F : 0.0F) + scale * normal(random), model.dtype));
    }
  }
  return model;
}

void TinyModel::write(const std::filesystem::path& folder) const {
  std::filesystem::create_directories(folder);
  write_file(folder / "config.json", config_json);
  SafetensorsBuilder builder;
  for (const auto& [name, tensor] : tensors) {
    std::string shape = "[";
    for (int axis = 0; axis < tensor.shape.rank(); ++axis) {
      if (axis > 0) shape += ",";
      shape += std::to_string(tensor.shape[axis]);
    }
    const char* type = dtype == DType::kFloat32 ? "F32" : dtype == DType::kFloat16 ? "F16" : "BF16";
    builder.add(name, type, shape + "]", bytes_of(tensor, dtype));
  }
  write_file(folder / "model.safetensors", builder.str());
}

std::vector<double> reference_logits(const TinyModel& model,
                                     const std::vector<std::int32_t>& tokens) {
  const ModelConfig& config = model.config;
  const auto find = [&](const std::string& name) -> const TinyTensor* {
    const auto it = model.tensors.find(name);
    return it == model.tensors.end() ? nullptr : &it->second;
  };
  const TinyTensor& table = *find(std::string(kEmbedding));
  const auto hidden = static_cast<std::ptrdiff_t>(config.hidden_size);
  Matrix x;
  for (const std::int32_t token : tokens) {
    const auto row = table.values.begin() + token * hidden;
    x.emplace_back(row, row + hidden);
  }
  for (std::int32_t i = 0; i < config.num_layers; ++i) {
    const auto linear = [&](const Matrix& in, const std::string& part) {
      const std::string name = layer_tensor(i, part);
      return product(in, *find(name + ".weight"), find(name + ".bias"));
    };
    Matrix normed =
        norm(x, *find(layer_tensor(i, "input_layernorm.weight")), config.rms_norm_epsilon);
    Matrix q = linear(normed, "self_attn.q_proj"), k = linear(normed, "self_attn.k_proj");
    const Matrix v = linear(normed, "self_attn.v_proj");
    rotate(q, config);
    rotate(k, config);
    add(x, linear(attend(q, k, v, config), "self_attn.o_proj"));
    normed =
        norm(x, *find(layer_tensor(i, "post_attention_layernorm.weight")), config.rms_norm_epsilon);
    Matrix gate = linear(normed, "mlp.gate_proj");
    const Matrix up = linear(normed, "mlp.up_proj");
    for (std::size_t t = 0; t < gate.size(); ++t) {
      for (std::size_t n = 0; n < gate[t].size(); ++n) {
        gate[t][n] *= up[t][n] / (1.0 + std::exp(-gate[t][n]));
      }
    }
    add(x, linear(gate, "mlp.down_proj"));
  }
  const TinyTensor* head = find(std::string(kLmHead));
  const Matrix logits = product(norm(x, *find(std::string(kFinalNorm)), config.rms_norm_epsilon),
                                head == nullptr ? table : *head, nullptr);
  std::vector<double> out;
  for (const std::vector<double>& row : logits) out.insert(out.end(), row.begin(), row.end());
  return out;
}

double relative_error(const std::vector<float>& got, const std::vector<double>& expected) {
  if (got.size() != expected.size()) return INFINITY;
  double difference = 0.0, norm_squared = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm_squared += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm_squared);
}

}  // namespace deltazip::test
