#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "deltazip/base/digest.h"
#include "deltazip/base/thread_pool.h"
#include "deltazip/io/safetensors.h"

namespace deltazip {

// A Hugging Face model folder: config.json and model.safetensors, or the shards that
// model.safetensors.index.json names. Shard names may not leave the folder.
class Checkpoint {
 public:
  static Checkpoint open(const std::filesystem::path& folder);

  const std::filesystem::path& folder() const { return folder_; }
  const std::string& config_json() const { return config_json_; }            // text of config.json
  const std::vector<SafetensorsEntry>& tensors() const { return tensors_; }  // by name
  const SafetensorsEntry* find(std::string_view name) const;

  // Identity of the weights: SHA-256 over the tensors sorted by name of
  // (name, '\0', dtype name, '\0', shape as "4096,11008", '\0', SHA-256 of the bytes).
  // The dtype name is safetensors' ("BF16"). Tensors are hashed in parallel.
  Digest weights_digest(ThreadPool& pool) const;

 private:
  std::filesystem::path folder_;
  std::string config_json_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::vector<SafetensorsEntry> tensors_;
};

}  // namespace deltazip
