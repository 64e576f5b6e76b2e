#include "deltazip/model/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "deltazip/base/error.h"
#include "deltazip/io/json_text.h"

namespace deltazip {
namespace {

using Json = nlohmann::json;

// What differs between the architectures this decoder serves.
struct Architecture {
  std::string_view name;
  std::int64_t default_max_positions;
  bool has_bias_settings;         // attention_bias and mlp_bias are read
  bool has_sliding_window;        // served only where the window never closes
  std::int64_t default_window;    // when the key is missing
  std::int32_t default_kv_heads;  // when the key is missing; 0: as many as heads
};

constexpr std::array kArchitectures = {
    Architecture{"LlamaForCausalLM", 2048, true, false, 0, 0},
    Architecture{"MistralForCausalLM", 131072, false, true, 4096, 8},
};

// Far above any model of today, far below where a product of two overflows.
constexpr std::int64_t kMaxVocab = 1 << 24, kMaxWidth = 1 << 20, kMaxLayers = 1024,
                       kMaxHeads = 4096, kMaxHeadDim = 1024, kMaxPositions = 1 << 24;
constexpr double kMaxTheta = 1e15, kMaxFactor = 1e6;

// One JSON object whose values are read by key; messages carry `where`, the file or the path to it.
class Reader {
 public:
  Reader(const Json& object, std::string where) : object_(&object), where_(std::move(where)) {}

  // nullptr: missing or null.
  const Json* get(const char* key) const {
    const auto it = object_->find(key);
    return it == object_->end() || it->is_null() ? nullptr : &*it;
  }
  bool has(const char* key) const { return get(key) != nullptr; }

  std::int64_t integer(const char* key, std::int64_t min, std::int64_t max,
                       std::optional<std::int64_t> fallback = {}) const {
    const Json* value = get(key);
    if (value == nullptr) {
      DZ_CHECK(fallback.has_value(), where_, ": '", key, "' is missing, expected an integer");
      return *fallback;
    }
    return integer(*value, key, min, max);
  }

  std::int64_t integer(const Json& value, const char* key, std::int64_t min,
                       std::int64_t max) const {
    const bool fits = value.is_number_unsigned()
                          ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(max) &&
                                static_cast<std::int64_t>(value.get<std::uint64_t>()) >= min
                          : value.is_number_integer() && value.get<std::int64_t>() >= min &&
                                value.get<std::int64_t>() <= max;
    DZ_CHECK(fits, where_, ": '", key, "' must be an integer from ", min, " to ", max, ", got ",
             shown(value));
    return value.get<std::int64_t>();
  }

  // In (above, max].
  double number(const char* key, double above, double max,
                std::optional<double> fallback = {}) const {
    const Json* value = get(key);
    if (value == nullptr) {
      DZ_CHECK(fallback.has_value(), where_, ": '", key, "' is missing, expected a number");
      return *fallback;
    }
    DZ_CHECK(value->is_number() && value->get<double>() > above && value->get<double>() <= max,
             where_, ": '", key, "' must be a number above ", above, " and at most ", max, ", got ",
             shown(*value));
    return value->get<double>();
  }

  bool boolean(const char* key, bool fallback) const {
    const Json* value = get(key);
    if (value == nullptr) return fallback;
    DZ_CHECK(value->is_boolean(), where_, ": '", key, "' must be true or false, got ",
             shown(*value));
    return value->get<bool>();
  }

  std::optional<std::string> text(const char* key) const {
    const Json* value = get(key);
    if (value == nullptr) return {};
    DZ_CHECK(value->is_string(), where_, ": '", key, "' must be a string, got ", shown(*value));
    return value->get<std::string>();
  }

  std::optional<Reader> object(const char* key) const {
    const Json* value = get(key);
    if (value == nullptr) return {};
    DZ_CHECK(value->is_object(), where_, ": '", key, "' must be an object, got ", shown(*value));
    return Reader(*value, where_ + ": '" + key + "'");
  }

  const std::string& where() const { return where_; }

  static std::string shown(const Json& value) {
    return printable(value.dump(-1, ' ', true, Json::error_handler_t::replace), 80);
  }

 private:
  const Json* object_;
  std::string where_;
};

Json parse_object(std::string_view text, std::string_view file) {
  check_json_object(text, file);
  try {
    return Json::parse(text);
  } catch (const Json::exception& error) {  // a number out of range
    detail::fail<InvalidArgument>(file, ": not valid JSON: ", printable(error.what()));
  }
}

std::vector<std::int32_t> read_eos(const Reader& in, std::int64_t vocab_size) {
  std::vector<std::int32_t> ids;
  const Json* value = in.get("eos_token_id");
  if (value == nullptr) return ids;
  const auto add = [&](const Json& id) {
    ids.push_back(static_cast<std::int32_t>(in.integer(id, "eos_token_id", 0, vocab_size - 1)));
  };
  if (value->is_array()) {
    DZ_CHECK(value->size() <= 1024, in.where(), ": 'eos_token_id' has ", value->size(),
             " entries, at most 1024 are read");
    for (const Json& id : *value) add(id);
  } else {
    add(*value);
  }
  return ids;
}

const Architecture& read_architecture(const Reader& in) {
  const auto known = [] {
    std::string names;
    for (const Architecture& each : kArchitectures) {
      names += (names.empty() ? "" : ", ") + std::string(each.name);
    }
    return names;
  };
  const Json* value = in.get("architectures");
  DZ_CHECK(value != nullptr && value->is_array() && value->size() == 1 && (*value)[0].is_string(),
           in.where(), ": 'architectures' must be a list of one name (served: ", known(), "), got ",
           value == nullptr ? "nothing" : Reader::shown(*value));
  const std::string name = (*value)[0].get<std::string>();
  for (const Architecture& each : kArchitectures) {
    if (each.name == name) return each;
  }
  detail::fail<InvalidArgument>(in.where(), ": architecture ", Reader::shown((*value)[0]),
                                " is not served; served are ", known());
}

RopeScaling read_rope_type(const Reader& in) {
  std::optional<std::string> type = in.text("rope_type");
  if (!type) type = in.text("type");
  if (!type || *type == "default") return RopeScaling::kNone;
  if (*type == "linear") return RopeScaling::kLinear;
  if (*type == "dynamic") return RopeScaling::kDynamic;
  if (*type == "llama3") return RopeScaling::kLlama3;
  if (*type == "yarn") return RopeScaling::kYarn;
  detail::fail<InvalidArgument>(in.where(), ": rope type '", *type,
                                "' is not served; served are default, linear, dynamic, llama3, "
                                "yarn");
}

// transformers 4 writes rope_theta beside rope_scaling, 5 writes all into rope_parameters; where
// both are there, the object's own value goes before the one beside it, as transformers has it.
RopeConfig read_rope(const Reader& in, std::int64_t max_positions) {
  RopeConfig rope;
  rope.theta = in.number("rope_theta", 1.0, kMaxTheta, rope.theta);
  std::optional<Reader> object = in.object("rope_scaling");
  if (!object) object = in.object("rope_parameters");
  const Reader& from = object ? *object : in;
  for (const Reader& reader : {in, from}) {
    DZ_CHECK(reader.number("partial_rotary_factor", 0.0, 1.0, 1.0) == 1.0, reader.where(),
             ": 'partial_rotary_factor' below 1 is not served");
  }
  if (!object) return rope;

  rope.theta = from.number("rope_theta", 1.0, kMaxTheta, rope.theta);
  rope.scaling = read_rope_type(from);
  if (rope.scaling == RopeScaling::kNone) return rope;

  rope.original_max_positions =
      from.integer("original_max_position_embeddings", 1, kMaxPositions, max_positions);
  if (rope.scaling == RopeScaling::kLlama3 || rope.scaling == RopeScaling::kYarn) {
    rope.original_max_positions = in.integer("original_max_position_embeddings", 1, kMaxPositions,
                                             rope.original_max_positions);
  }
  std::optional<double> factor;
  if (rope.scaling == RopeScaling::kYarn) {
    factor = static_cast<double>(max_positions) / static_cast<double>(rope.original_max_positions);
  }
  rope.factor = from.number("factor", 0.0, kMaxFactor, factor);
  if (rope.scaling == RopeScaling::kLlama3) {
    rope.low_freq_factor = from.number("low_freq_factor", 0.0, kMaxFactor);
    rope.high_freq_factor = from.number("high_freq_factor", 0.0, kMaxFactor);
  }
  if (rope.scaling == RopeScaling::kYarn) {
    const double at_zero = -std::numeric_limits<double>::min();  // 0 stands for "not given"
    const auto given = [&](const char* key, double fallback) {
      const double value = from.number(key, at_zero, kMaxFactor, fallback);
      return value == 0.0 ? fallback : value;
    };
    rope.beta_fast = given("beta_fast", rope.beta_fast);
    rope.beta_slow = given("beta_slow", rope.beta_slow);
    rope.attention_factor = from.number("attention_factor", 0.0, kMaxFactor, 0.0);
    rope.mscale = given("mscale", 0.0);
    rope.mscale_all_dim = given("mscale_all_dim", 0.0);
    rope.truncate = from.boolean("truncate", true);
  }
  return rope;
}

void refuse_what_is_not_served(const Reader& in, const Architecture& architecture,
                               std::int64_t max_positions) {
  const Json* quantization = in.get("quantization_config");
  DZ_CHECK(quantization == nullptr, in.where(),
           ": 'quantization_config' is set: a quantised base is not served, expected bfloat16, "
           "float16 or float32 weights, got ",
           Reader::shown(*quantization));
  const std::string activation = in.text("hidden_act").value_or("silu");
  DZ_CHECK(activation == "silu" || activation == "swish", in.where(),
           ": 'hidden_act' must be 'silu', got '", activation, "'");
  if (const Json* types = in.get("layer_types"); types != nullptr) {
    DZ_CHECK(types->is_array() && std::all_of(types->begin(), types->end(),
                                              [](const Json& t) { return t == "full_attention"; }),
             in.where(), ": 'layer_types' other than full_attention are not served, got ",
             Reader::shown(*types));
  }
  if (architecture.has_sliding_window) {
    // null turns the window off; a missing key is transformers' default.
    const auto window =
        in.integer("sliding_window", 1, std::numeric_limits<std::int64_t>::max(), max_positions);
    DZ_CHECK(window >= max_positions, in.where(), ": 'sliding_window' ", window,
             " is below 'max_position_embeddings' ", max_positions,
             ": sliding-window attention is not served");
  }
}

}  // namespace

ModelConfig ModelConfig::parse(std::string_view config_json) {
  const Json json = parse_object(config_json, "config.json");
  const Reader in(json, "config.json");
  const Architecture& architecture = read_architecture(in);

  ModelConfig config;
  config.architecture = architecture.name;
  config.vocab_size = in.integer("vocab_size", 1, kMaxVocab);
  config.hidden_size = in.integer("hidden_size", 1, kMaxWidth);
  config.intermediate_size = in.integer("intermediate_size", 1, kMaxWidth);
  config.num_layers = static_cast<std::int32_t>(in.integer("num_hidden_layers", 1, kMaxLayers));
  config.num_heads = static_cast<std::int32_t>(in.integer("num_attention_heads", 1, kMaxHeads));
  // Only a missing key has the architecture's default; null means one per head.
  const bool kv_heads_missing =
      architecture.default_kv_heads != 0 && json.find("num_key_value_heads") == json.end();
  config.num_kv_heads = static_cast<std::int32_t>(
      in.integer("num_key_value_heads", 1, kMaxHeads,
                 kv_heads_missing ? architecture.default_kv_heads : config.num_heads));
  if (!in.has("head_dim")) {
    DZ_CHECK(config.hidden_size % config.num_heads == 0, "config.json: 'hidden_size' ",
             config.hidden_size, " is not a multiple of 'num_attention_heads' ", config.num_heads,
             ", and 'head_dim' is not given");
  }
  config.head_dim = static_cast<std::int32_t>(
      in.integer("head_dim", 1, kMaxHeadDim, config.hidden_size / config.num_heads));
  config.max_positions =
      in.integer("max_position_embeddings", 1, kMaxPositions, architecture.default_max_positions);
  config.rms_norm_epsilon = static_cast<float>(in.number("rms_norm_eps", 0.0, 1.0, 1e-6));
  config.tie_word_embeddings = in.boolean("tie_word_embeddings", false);
  if (architecture.has_bias_settings) {
    config.attention_bias = in.boolean("attention_bias", false);
    config.mlp_bias = in.boolean("mlp_bias", false);
  }

  std::optional<std::string> dtype = in.text("dtype");
  if (!dtype) dtype = in.text("torch_dtype");
  if (dtype) {
    const std::string bare = dtype->starts_with("torch.") ? dtype->substr(6) : *dtype;
    const std::optional<DType> known = dtype_from_name(bare);
    DZ_CHECK(known && is_floating(*known),
             "config.json: 'dtype' must be float32, float16 or bfloat16, got '", *dtype, "'");
    config.dtype = *known;
  }

  std::int64_t window_bound = config.max_positions;
  if (architecture.has_sliding_window && json.find("sliding_window") == json.end()) {
    window_bound = architecture.default_window;
  }
  DZ_CHECK(window_bound >= config.max_positions, "config.json: 'sliding_window' is missing, which ",
           "means ", window_bound, ", below 'max_position_embeddings' ", config.max_positions,
           ": sliding-window attention is not served");
  refuse_what_is_not_served(in, architecture, config.max_positions);
  config.rope = read_rope(in, config.max_positions);
  config.eos_token_ids = read_eos(in, config.vocab_size);
  config.validate();
  return config;
}

void ModelConfig::apply_generation_config(std::string_view generation_config_json) {
  const Json json = parse_object(generation_config_json, "generation_config.json");
  const Reader in(json, "generation_config.json");
  std::vector<std::int32_t> ids = read_eos(in, vocab_size);
  if (!ids.empty()) eos_token_ids = std::move(ids);
}

void ModelConfig::validate() const {
  DZ_CHECK(num_heads % num_kv_heads == 0, "config.json: 'num_attention_heads' ", num_heads,
           " is not a multiple of 'num_key_value_heads' ", num_kv_heads);
  DZ_CHECK(head_dim % 2 == 0, "config.json: 'head_dim' must be even for RoPE, got ", head_dim);
  DZ_CHECK(static_cast<std::int64_t>(num_heads) * head_dim <= kMaxWidth,
           "config.json: 'num_attention_heads' ", num_heads, " times 'head_dim' ", head_dim,
           " is above ", kMaxWidth);
  if (rope.scaling == RopeScaling::kDynamic) {
    DZ_CHECK(head_dim >= 4, "config.json: dynamic RoPE needs 'head_dim' of 4 or more, got ",
             head_dim);
  }
  if (rope.scaling == RopeScaling::kLlama3) {
    DZ_CHECK(rope.high_freq_factor > rope.low_freq_factor,
             "config.json: 'high_freq_factor' must be above 'low_freq_factor', got ",
             rope.high_freq_factor, " and ", rope.low_freq_factor);
  }
  if (rope.scaling == RopeScaling::kYarn) {
    DZ_CHECK(rope.beta_fast >= rope.beta_slow,
             "config.json: 'beta_fast' must not be below 'beta_slow', got ", rope.beta_fast,
             " and ", rope.beta_slow);
  }
}

std::int64_t ModelConfig::max_length() const {
  if (rope.scaling != RopeScaling::kDynamic) return max_positions;
  const double scaled = static_cast<double>(max_positions) * std::max(1.0, rope.factor);
  return static_cast<std::int64_t>(std::min(scaled, static_cast<double>(kMaxPositions)));
}

}  // namespace deltazip
