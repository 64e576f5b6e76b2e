#include "deltazip/io/checkpoint.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "deltazip/base/error.h"
#include "deltazip/io/json_text.h"

namespace deltazip {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxConfigBytes = 16u << 20;
constexpr std::size_t kMaxIndexBytes = 64u << 20;
constexpr const char* kSingleName = "model.safetensors";
constexpr const char* kIndexName = "model.safetensors.index.json";

// Tensor name -> shard file name, as the index says.
using WeightMap = std::map<std::string, std::string, std::less<>>;

void check_shard_name(const std::string& shard, const std::string& index) {
  constexpr std::string_view kSuffix = ".safetensors";
  DZ_CHECK(shard.find_first_of("/\\") == std::string::npos && shard.size() > kSuffix.size() &&
               shard.ends_with(kSuffix) && shard.front() != '.',
           index, ": shard '", printable(shard), "' is not a plain file name ending in ", kSuffix);
}

WeightMap read_index(const fs::path& path) {
  const std::string what = path.string();
  const std::string text = read_text_file(path, kMaxIndexBytes);
  check_json_object(text, what);
  const nlohmann::json index = nlohmann::json::parse(text);
  const auto found = index.find("weight_map");
  DZ_CHECK(found != index.end() && found->is_object() && !found->empty(), what,
           ": 'weight_map' must be an object that names the tensors");
  WeightMap map;
  for (const auto& [tensor, shard] : found->items()) {
    DZ_CHECK(shard.is_string(), what, ": tensor '", printable(tensor),
             "' must name its shard, got ", printable(shard.dump(), 40));
    check_shard_name(shard.get_ref<const std::string&>(), what);
    map.emplace(tensor, shard.get<std::string>());
  }
  return map;
}

// Every tensor is in the shard that the index names, and in no other.
void check_index(const WeightMap& map, const SafetensorsFile& file, const std::string& shard,
                 const std::string& index) {
  for (const SafetensorsEntry& entry : file.entries()) {
    const auto found = map.find(entry.name);
    DZ_CHECK(found != map.end(), index, ": shard '", shard, "' holds tensor '",
             printable(entry.name), "', which the index does not name");
    DZ_CHECK(found->second == shard, index, ": tensor '", printable(entry.name), "' is in shard '",
             shard, "', the index places it in '", found->second, "'");
  }
}

}  // namespace

Checkpoint Checkpoint::open(const fs::path& folder) {
  std::error_code ignored;
  DZ_CHECK(fs::is_directory(folder, ignored), "'", folder.string(), "' is not a folder");
  Checkpoint checkpoint;
  checkpoint.folder_ = folder;
  const fs::path config = folder / "config.json";
  DZ_CHECK(fs::exists(config, ignored), "'", folder.string(),
           "' is not a Hugging Face model folder: it has no config.json");
  checkpoint.config_json_ = read_text_file(config, kMaxConfigBytes);
  check_json_object(checkpoint.config_json_, config.string());

  const fs::path index = folder / kIndexName;
  if (fs::exists(folder / kSingleName, ignored)) {  // transformers too prefers it to an index
    checkpoint.files_.push_back(SafetensorsFile::open(folder / kSingleName));
  } else {
    DZ_CHECK(fs::exists(index, ignored), "'", folder.string(), "' has neither ", kSingleName,
             " nor ", kIndexName, "; other formats of weights are not read");
    const WeightMap map = read_index(index);
    std::set<std::string> shards;
    for (const auto& [tensor, shard] : map) shards.insert(shard);
    for (const std::string& shard : shards) {
      checkpoint.files_.push_back(SafetensorsFile::open(folder / shard));
      check_index(map, *checkpoint.files_.back(), shard, index.string());
    }
    for (const auto& [tensor, shard] : map) {
      const auto position =
          static_cast<std::size_t>(std::distance(shards.begin(), shards.find(shard)));
      DZ_CHECK(checkpoint.files_[position]->find(tensor) != nullptr, index.string(), ": tensor '",
               printable(tensor), "' is not in shard '", shard, "'");
    }
  }
  for (const auto& file : checkpoint.files_) {
    checkpoint.tensors_.insert(checkpoint.tensors_.end(), file->entries().begin(),
                               file->entries().end());
  }
  DZ_CHECK(!checkpoint.tensors_.empty(), "'", folder.string(), "' has no tensors");
  std::sort(checkpoint.tensors_.begin(), checkpoint.tensors_.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  return checkpoint;
}

const SafetensorsEntry* Checkpoint::find(std::string_view name) const {
  const auto found =
      std::lower_bound(tensors_.begin(), tensors_.end(), name,
                       [](const auto& entry, std::string_view key) { return entry.name < key; });
  return found != tensors_.end() && found->name == name ? &*found : nullptr;
}

Digest Checkpoint::weights_digest(ThreadPool& pool) const {
  // (file, entry) pairs, largest first, so that no thread is left with a big one at the end.
  struct Item {
    const SafetensorsFile* file;
    const SafetensorsEntry* entry;
    std::size_t position;  // in tensors_
  };
  std::vector<Item> items;
  for (const auto& file : files_) {
    for (const SafetensorsEntry& entry : file->entries()) {
      items.push_back(
          {file.get(), &entry, static_cast<std::size_t>(find(entry.name) - tensors_.data())});
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return a.entry->view.num_bytes() > b.entry->view.num_bytes();
  });

  std::vector<Digest> digests(items.size());
  std::atomic<std::size_t> next{0};
  pool.parallel_for(pool.num_threads(), 1, [&](std::int64_t, std::int64_t, int) {
    for (std::size_t i = next++; i < items.size(); i = next++) {
      digests[items[i].position] = items[i].file->digest(*items[i].entry);
    }
  });

  Sha256 hash;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    constexpr std::string_view kNul("\0", 1);
    const ConstTensorView& view = tensors_[i].view;
    hash.update(tensors_[i].name).update(kNul).update(safetensors_name(view.dtype)).update(kNul);
    hash.update(digest_text(view.shape))
        .update(kNul)
        .update(std::as_bytes(std::span(digests[i].bytes)));
  }
  return hash.finish();
}

}  // namespace deltazip
