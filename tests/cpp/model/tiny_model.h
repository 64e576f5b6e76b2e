#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "deltazip/base/tensor_view.h"
#include "deltazip/model/config.h"

namespace deltazip::test {

struct TinyTensor {
  Shape shape;
  std::vector<float> values;  // row-major; exact in the model's dtype
};

// A Llama small enough to be computed naively, with random weights.
struct TinyModel {
  std::string config_json;
  ModelConfig config;
  DType dtype = DType::kFloat32;
  std::map<std::string, TinyTensor> tensors;

  // config.json and model.safetensors
  void write(const std::filesystem::path& folder) const;
};

// `patch`: JSON merged into a config of two layers, hidden 32, four heads over two of keys.
TinyModel make_tiny_model(const std::string& patch, std::uint32_t seed);

// Uniform in [0, below).
inline std::uint32_t draw(std::mt19937& random, std::uint32_t below) {
  return static_cast<std::uint32_t>(random()) % below;
}

// `count` ids of the tiny models' vocabulary.
std::vector<std::int32_t> random_tokens(std::size_t count, std::uint32_t seed);

// Rounds to the dtype and back.
float rounded(float value, DType dtype);

// [tokens, vocab_size], in double throughout, one sequence, straight from the definition.
std::vector<double> reference_logits(const TinyModel& model,
                                     const std::vector<std::int32_t>& tokens);

// Norm of the difference over the norm of `expected`.
double relative_error(const std::vector<float>& got, const std::vector<double>& expected);

}  // namespace deltazip::test
