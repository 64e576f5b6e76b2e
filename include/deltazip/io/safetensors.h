#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "deltazip/base/tensor_view.h"

namespace deltazip {

struct SafetensorsEntry {
  std::string name;
  ConstTensorView view;  // points into the mapping; 8-byte aligned relative to the file's data
  std::span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(view.data), view.num_bytes()};
  }
};

// A safetensors file, memory-mapped and fully validated at open(): header length against the file,
// JSON, dtypes, shapes against offsets (checked arithmetic), alignment, no overlap, no hole, no
// trailing bytes. Every failure is an InvalidArgument that names the file, the tensor and the
// numbers. Format: https://github.com/huggingface/safetensors
class SafetensorsFile {
 public:
  static constexpr std::size_t kMaxHeaderBytes = 100u << 20;

  static std::shared_ptr<const SafetensorsFile> open(const std::filesystem::path& path);
  // The same checks over bytes in memory (fuzzing, tests). `name` stands in messages.
  static std::shared_ptr<const SafetensorsFile> parse(std::span<const std::byte> bytes,
                                                      std::string name);
  ~SafetensorsFile();

  const std::vector<SafetensorsEntry>& entries() const;  // by offset
  const SafetensorsEntry* find(std::string_view name) const;
  const std::map<std::string, std::string, std::less<>>& metadata() const;
  std::size_t num_bytes() const;

 private:
  SafetensorsFile();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltazip
