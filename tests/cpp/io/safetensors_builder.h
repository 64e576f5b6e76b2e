#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace deltazip::test {

// Bytes that are 8-byte aligned, as a mapping is.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(std::string_view text) : words_((text.size() + 7) / 8), size_(text.size()) {
    if (!text.empty()) std::memcpy(words_.data(), text.data(), text.size());
  }
  std::span<const std::byte> span() const { return std::as_bytes(std::span(words_)).first(size_); }

 private:
  std::vector<std::uint64_t> words_;
  std::size_t size_ = 0;
};

// The file as it is laid down: length, header, data. Nothing is checked, so that tests can lie.
inline std::string safetensors_text(std::string header, std::string_view data) {
  header.append((8 - header.size() % 8) % 8, ' ');
  std::string file(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) {
    file[i] = static_cast<char>((std::uint64_t{header.size()} >> (8 * i)) & 0xFF);
  }
  return file + header + std::string(data);
}

// Writes a valid file: tensors in the order they are added, which must keep them aligned.
class SafetensorsBuilder {
 public:
  struct Tensor {
    std::string name, dtype, shape, data;
  };
  std::vector<Tensor> tensors;
  std::map<std::string, std::string> metadata;  // values are given as JSON string bodies

  SafetensorsBuilder& add(std::string name, std::string dtype, std::string shape,
                          std::string data) {
    tensors.push_back({std::move(name), std::move(dtype), std::move(shape), std::move(data)});
    return *this;
  }
  std::string str() const {
    std::string header = "{", data;
    if (!metadata.empty()) {
      header += "\"__metadata__\":{";
      for (const auto& [key, value] : metadata) {
        if (header.back() != '{') header += ',';
        header += "\"" + key + "\":\"" + value + "\"";
      }
      header += "}";
    }
    for (const Tensor& tensor : tensors) {
      if (header.back() != '{') header += ',';
      header += "\"" + tensor.name + "\":{\"dtype\":\"" + tensor.dtype +
                "\",\"shape\":" + tensor.shape + ",\"data_offsets\":[" +
                std::to_string(data.size()) + "," +
                std::to_string(data.size() + tensor.data.size()) + "]}";
      data += tensor.data;
    }
    return safetensors_text(header + "}", data);
  }
};

inline void write_file(const std::filesystem::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary) << text;
}

// A folder of its own for one test, removed at its end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "deltazip-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// The message of the InvalidArgument that `action` must throw; "" when it threw nothing.
template <typename E, typename Action>
std::string message_of(Action&& action) {
  try {
    action();
  } catch (const E& error) {
    return error.what();
  }
  return "";
}

}  // namespace deltazip::test
