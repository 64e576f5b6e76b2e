#include "model/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

namespace deltazip {
namespace {

using Json = nlohmann::json;

ModelConfig config_of(const Json& rope_parameters, std::int32_t head_dim,
                      std::int64_t max_positions) {
  Json json = {{"architectures", {"LlamaForCausalLM"}},
               {"vocab_size", 32},
               {"hidden_size", 2 * head_dim},
               {"intermediate_size", 32},
               {"num_hidden_layers", 1},
               {"num_attention_heads", 2},
               {"head_dim", head_dim},
               {"max_position_embeddings", max_positions},
               {"rope_parameters", rope_parameters}};
  return ModelConfig::parse(json.dump());
}

// tests/data/make_rope_golden.py wrote these with transformers.
TEST(Rope, AgreesWithTransformers) {
  std::ifstream file(std::string(DELTAZIP_TEST_DATA) + "/rope_golden.json");
  const Json golden = Json::parse(file);
  const auto head_dim = golden["head_dim"].get<std::int32_t>();
  const auto half = static_cast<std::size_t>(head_dim / 2);
  ASSERT_EQ(golden["cases"].size(), 10U);
  for (const Json& each : golden["cases"]) {
    const Rope rope(
        config_of(each["rope_parameters"], head_dim, golden["max_positions"].get<std::int64_t>()));
    const auto length = each["length"].get<std::int64_t>();
    std::vector<float> angles(2 * half);
    for (std::size_t p = 0; p < each["positions"].size(); ++p) {
      const auto position = each["positions"][p].get<std::int64_t>();
      rope.write_angles(position, length, angles);
      // A frequency may be an ulp off (2^-24 of it), which the position multiplies.
      const double tolerance = 3e-7 + 1.2e-7 * static_cast<double>(position);
      for (std::size_t i = 0; i < half; ++i) {
        EXPECT_NEAR(angles[i], each["cos"][p][i].get<double>(), tolerance)
            << each["name"] << " position " << position << " cosine " << i;
        EXPECT_NEAR(angles[half + i], each["sin"][p][i].get<double>(), tolerance)
            << each["name"] << " position " << position << " sine " << i;
      }
    }
  }
}

TEST(Rope, OnlyDynamicScalingLooksAtTheLength) {
  const Json dynamic = {{"rope_type", "dynamic"}, {"factor", 2.0}};
  const Json linear = {{"rope_type", "linear"}, {"factor", 2.0}};
  EXPECT_FALSE(Rope(config_of(dynamic, 16, 64)).depends_on_length(64));
  EXPECT_TRUE(Rope(config_of(dynamic, 16, 64)).depends_on_length(65));
  EXPECT_FALSE(Rope(config_of(linear, 16, 64)).depends_on_length(65));
}

// A length asked for between two others must not leave its frequencies behind.
TEST(Rope, LengthsDoNotDisturbEachOther) {
  const Rope rope(config_of({{"rope_type", "dynamic"}, {"factor", 2.0}}, 16, 64));
  const auto angles = [&](std::int64_t length) {
    std::vector<float> out(16);
    rope.write_angles(40, length, out);
    return out;
  };
  const std::vector<float> at_64 = angles(64), at_80 = angles(80), at_100 = angles(100);
  EXPECT_NE(at_64, at_80);
  EXPECT_NE(at_80, at_100);
  EXPECT_EQ(angles(80), at_80);
  EXPECT_EQ(angles(64), at_64);
  EXPECT_EQ(angles(100), at_100);
}

}  // namespace
}  // namespace deltazip
