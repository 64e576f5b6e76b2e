#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "deltazip/base/digest.h"
#include "deltazip/base/tensor_view.h"

namespace deltazip {

// "F32", "BF16", ...: the spelling of safetensors. Other dtypes of the format are refused.
std::string_view safetensors_name(DType dtype);
std::optional<DType> dtype_from_safetensors_name(std::string_view name);

// "4096,11008": how a shape enters a digest.
std::string digest_text(const Shape& shape);

struct SafetensorsEntry {
  std::string name;
  ConstTensorView view;  // points into the mapping, aligned to its element
  std::span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(view.data), view.num_bytes()};
  }
};

// A safetensors file, memory-mapped and fully validated at open(): header length against the file,
// JSON, dtypes, shapes against offsets (checked arithmetic), alignment, no overlap, no hole, no
// trailing bytes. Memory besides the mapping stays within a small multiple of the header. Every
// failure is an InvalidArgument that names the file, the tensor and the numbers. Format:
// https://github.com/huggingface/safetensors
class SafetensorsFile {
 public:
  static constexpr std::size_t kMaxHeaderBytes = 100u << 20;

  static std::shared_ptr<const SafetensorsFile> open(const std::filesystem::path& path);
  // The same checks over bytes in memory (fuzzing, tests), 8-byte aligned and outliving this.
  // `name` stands in messages.
  static std::shared_ptr<const SafetensorsFile> parse(std::span<const std::byte> bytes,
                                                      std::string name);
  ~SafetensorsFile();

  const std::vector<SafetensorsEntry>& entries() const;  // by offset
  const SafetensorsEntry* find(std::string_view name) const;
  const std::map<std::string, std::string, std::less<>>& metadata() const;
  std::size_t num_bytes() const;
  const std::string& name() const;  // the path, as given

  // Copies out.size() bytes of an entry of this file, from `offset` on. Reads the file instead of
  // the mapping: if it was cut short meanwhile this throws, where the mapping would be a SIGBUS.
  void read(const SafetensorsEntry& entry, std::size_t offset, std::span<std::byte> out) const;
  // read() in pieces of at most a MiB, each given to `piece` in order.
  void stream(
      const SafetensorsEntry& entry,
      const std::function<void(std::size_t offset, std::span<const std::byte>)>& piece) const;
  Digest digest(const SafetensorsEntry& entry) const;  // SHA-256 of its bytes
  // Throws InvalidArgument when the file on disk was changed in place since open().
  void check_unchanged() const;

 private:
  SafetensorsFile();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltazip
