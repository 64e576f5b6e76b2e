#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "deltazip/base/digest.h"
#include "deltazip/delta/packed_stream.h"
#include "io/safetensors_builder.h"

namespace deltazip::test {

// Writes a valid delta file of random codes, or one that a test has spoilt. The layout of
// docs/delta_format.md a third time, apart from reader and writer.
class DeltaBuilder {
 public:
  struct Entry {
    std::string name, type, shape, digest_shape;
    int group_size = 0;
  };
  explicit DeltaBuilder(std::uint32_t seed = 1) : rng_(seed) {
    base_digest = sha256(std::as_bytes(std::span("base", 4)));
  }

  Digest base_digest;
  std::vector<Entry> entries;
  std::vector<SafetensorsBuilder::Tensor> stored;
  std::map<std::string, std::string> metadata_extra;
  // (from, to) replacements in the finished manifest; the content digest is not made anew.
  std::vector<std::pair<std::string, std::string>> edits;
  std::string format = "deltazip";
  bool is_packed = false;
  // Of a packed file: what is done to a tensor's stream, by its name.
  std::map<std::string, std::function<void(std::string&)>> streams;

  DeltaBuilder& unchanged(const std::string& name, std::vector<std::int64_t> shape) {
    return entry(name, "unchanged", shape, 0);
  }

  DeltaBuilder& replaced(const std::string& name, const std::string& dtype,
                         std::vector<std::int64_t> shape) {
    std::int64_t count = 1;
    for (const std::int64_t dim : shape) count *= dim;
    std::string data;
    for (std::int64_t i = 0; i < count; ++i) {
      // 0x3C.. is about one as a float16 and below one as a bfloat16 or float32.
      if (dtype == "F32") data += {random_byte(), random_byte()};
      data += {random_byte(), '\x3C'};
    }
    stored.push_back({name, dtype, shape_text(shape, ","), data});
    return entry(name, "replaced", shape, 0);
  }

  DeltaBuilder& matrix(const std::string& name, const std::string& type, std::int64_t rows,
                       std::int64_t columns, int group_size) {
    const std::int64_t blocks = (columns + 31) / 32;
    const std::int64_t groups = (columns + group_size - 1) / group_size;
    static const std::map<std::string, int> kBytes{{"sparse24_int4", 8},    {"sparse24_int2", 4},
                                                   {"sparse24_ternary", 5}, {"sparse14_sign", 3},
                                                   {"dense_int4", 16},      {"dense_int8", 32}};
    const std::int64_t width = blocks * kBytes.at(type);
    const bool has_codes = type == "sparse24_ternary" || type == "sparse14_sign";
    std::string values;
    for (std::int64_t i = 0; i < rows * width; ++i) values += random_byte();
    store(name + (has_codes ? ".codes" : ".values"), "U8", {rows, width}, values);
    if (type == "sparse24_int4" || type == "sparse24_int2") {
      std::string indices;
      for (std::int64_t i = 0; i < rows * blocks * 4; ++i) {
        constexpr std::array<int, 6> kPairs{4, 8, 12, 9, 13, 14};
        indices += static_cast<char>(kPairs[rng_() % 6] | kPairs[rng_() % 6] << 4);
      }
      store(name + ".indices", "U8", {rows, blocks * 4}, indices);
    }
    std::string scales;
    for (std::int64_t i = 0; i < rows * groups; ++i) scales += {random_byte(), '\x20'};
    store(name + ".scales", "F16", {rows, groups}, scales);
    return entry(name, type, {rows, columns}, group_size);
  }

  SafetensorsBuilder::Tensor& find(const std::string& name) {
    return *std::find_if(stored.begin(), stored.end(),
                         [&](const auto& tensor) { return tensor.name == name; });
  }

  const SafetensorsBuilder::Tensor& find(const std::string& name) const {
    return const_cast<DeltaBuilder*>(this)->find(name);
  }

  DeltaBuilder& packed() {
    is_packed = true;
    return *this;
  }

  Digest content_digest() const {
    using namespace std::string_literals;
    const auto by_name = [](const auto& a, const auto& b) { return a.name < b.name; };
    auto sorted = entries;
    std::sort(sorted.begin(), sorted.end(), by_name);
    std::string text = "deltazip.delta.v1\0"s + base_digest.hex() + "\0"s;
    for (const Entry& entry : sorted) {
      text += entry.name + "\0"s + entry.type + "\0"s + entry.digest_shape + "\0"s +
              std::to_string(entry.group_size) + "\0"s;
    }
    auto tensors = stored;
    std::sort(tensors.begin(), tensors.end(), by_name);
    for (const auto& tensor : tensors) {
      const Digest digest = sha256(std::as_bytes(std::span(tensor.data)));
      text += tensor.name + "\0"s + tensor.dtype + "\0"s +
              std::string(reinterpret_cast<const char*>(digest.bytes.data()), digest.bytes.size());
    }
    return sha256(std::as_bytes(std::span(text)));
  }

  std::string manifest() const {
    std::string text = std::string("{\"version\":") +
                       (is_packed ? "2,\"lossless\":{\"codec\":\"zstd\"}" : "1") +
                       ",\"base_digest\":\"" + base_digest.hex() + "\",\"content_digest\":\"" +
                       content_digest().hex() + "\",\"tensors\":{";
    for (const Entry& entry : entries) {
      if (text.back() != '{') text += ',';
      text += "\"" + entry.name + "\":{\"type\":\"" + entry.type + "\",\"shape\":" + entry.shape;
      if (entry.group_size != 0) text += ",\"group_size\":" + std::to_string(entry.group_size);
      if (is_packed && entry.type == "replaced") {
        text += ",\"dtype\":\"" + find(entry.name).dtype + "\"";
      }
      text += "}";
    }
    text += "},\"base\":{\"name\":\"b\"},\"compressor\":{\"version\":\"0\"}}";
    for (const auto& [from, to] : edits) {
      const std::size_t at = text.find(from);
      text.replace(at == std::string::npos ? throw std::logic_error("no " + from) : at, from.size(),
                   to);
    }
    return text;
  }

  std::string str() const {
    SafetensorsBuilder file;
    std::string escaped;
    for (const char c : manifest()) {
      if (c == '"' || c == '\\') escaped += '\\';
      escaped += c;
    }
    file.metadata = {{"format", format}, {"manifest", escaped}};
    for (const auto& [key, value] : metadata_extra) file.metadata[key] = value;
    std::erase_if(file.metadata, [](const auto& item) { return item.second == kAbsent; });
    file.tensors = stored;
    const auto width = [](const SafetensorsBuilder::Tensor& tensor) {
      return tensor.dtype == "F32" || tensor.dtype == "I32" ? 4 : tensor.dtype == "U8" ? 1 : 2;
    };
    if (is_packed) {
      const auto codec = Codec::make("zstd");
      for (auto& tensor : file.tensors) {
        const auto bytes = encode_stream(*codec, std::as_bytes(std::span(tensor.data)),
                                         static_cast<std::size_t>(width(tensor)));
        tensor.data.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        if (const auto spoilt = streams.find(tensor.name); spoilt != streams.end()) {
          spoilt->second(tensor.data);
        }
        tensor.dtype = "U8";
        tensor.shape = "[" + std::to_string(tensor.data.size()) + "]";
      }
    }
    std::stable_sort(file.tensors.begin(), file.tensors.end(),
                     [&](const auto& a, const auto& b) { return width(a) > width(b); });
    return file.str();
  }

  static constexpr const char* kAbsent = "<absent>";  // a metadata value that removes its key

  static std::string shape_text(const std::vector<std::int64_t>& shape, const char* separator,
                                bool brackets = true) {
    std::string text;
    for (const std::int64_t dim : shape) {
      if (!text.empty()) text += separator;
      text += std::to_string(dim);
    }
    return brackets ? "[" + text + "]" : text;
  }

 private:
  char random_byte() { return static_cast<char>(rng_() & 0xFFu); }
  void store(const std::string& name, const std::string& dtype, std::vector<std::int64_t> shape,
             std::string data) {
    stored.push_back({name, dtype, shape_text(shape, ","), std::move(data)});
  }
  DeltaBuilder& entry(const std::string& name, const std::string& type,
                      const std::vector<std::int64_t>& shape, int group_size) {
    entries.push_back(
        {name, type, shape_text(shape, ","), shape_text(shape, ",", false), group_size});
    return *this;
  }

  std::mt19937 rng_;
};

// Two layers, an embedding, every type, columns that fit no alignment.
inline DeltaBuilder small_delta(std::uint32_t seed = 1) {
  DeltaBuilder builder(seed);
  builder.matrix("model.embed_tokens.weight", "dense_int4", 7, 70, 64)
      .matrix("model.layers.0.self_attn.q_proj.weight", "sparse24_int4", 6, 96, 32)
      .matrix("model.layers.0.mlp.up_proj.weight", "sparse24_int2", 5, 70, 64)
      .matrix("model.layers.1.self_attn.q_proj.weight", "sparse24_ternary", 9, 130, 64)
      .matrix("model.layers.1.mlp.up_proj.weight", "dense_int8", 3, 33, 32)
      .matrix("model.layers.1.mlp.gate_proj.weight", "sparse14_sign", 4, 70, 64)
      .replaced("model.layers.0.input_layernorm.weight", "BF16", {12})
      .replaced("model.layers.1.input_layernorm.weight", "F16", {12})
      .replaced("model.norm.weight", "F32", {12})
      .unchanged("lm_head.weight", {7, 70});
  return builder;
}

}  // namespace deltazip::test
