#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "deltazip/backend/backend.h"
#include "deltazip/delta/delta_file.h"

namespace deltazip {

// The layer of a tensor: 7 for "model.layers.7.mlp.up_proj.weight", -1 for those outside the
// layers.
std::int32_t layer_of(std::string_view name);

// Where one tensor of a delta lies in its bytes.
struct DeltaPart {
  std::string name;
  DeltaKind kind = DeltaKind::kUnchanged;
  DeltaMatrix matrix;                     // kMatrix: all but `data`
  std::int64_t num_elements = 0;          // kReplaced: stored as float32
  std::size_t offset = 0, num_bytes = 0;  // 64-byte aligned
};

// One delta in host memory, tiled for a backend, in the order in which a step reads it: layer by
// layer, then everything outside of them.
struct HostDelta {
  Digest content_digest;
  std::vector<DeltaPart> parts;  // by name; unchanged tensors too, without bytes
  Buffer bytes;                  // Backend::allocate_host; empty when every tensor is unchanged

  const DeltaPart* find(std::string_view name) const;  // nullptr: no such tensor
};

// What is known of a variant without its bytes.
struct DeltaSummary {
  std::string path;  // as given
  Digest content_digest;
  std::size_t file_bytes = 0;
  std::size_t tiled_bytes = 0;  // what it takes in host memory and in a slot
  std::string manifest_json;
};

// The bytes of all variants: on disk always, tiled in host memory within a budget (least recently
// used go first; they can be read again). Thread-safe.
class DeltaStore {
 public:
  // `base_tensors`: what every delta must cover. `host_budget_bytes` bounds what is kept for later,
  // 0: no bound; bytes that someone still uses stay alive beyond it. `num_threads` tile one delta.
  DeltaStore(Backend& backend, Digest base_digest, std::vector<BaseTensor> base_tensors,
             std::size_t host_budget_bytes, int num_threads = 1);
  ~DeltaStore();

  // Opens and fully validates; keeps the mapping, so later replacement of the path changes nothing.
  // Returns a handle that stays valid until remove(). Throws InvalidArgument.
  std::int32_t add(const std::filesystem::path& path);
  const DeltaSummary& summary(std::int32_t handle) const;  // NotFound; valid until remove()
  std::shared_ptr<const DeltaFile> file(std::int32_t handle) const;  // NotFound
  void remove(std::int32_t handle);  // NotFound. A load under way still ends well

  // The tiled bytes, from memory or by tiling the file again. Slow; not on the engine's thread.
  // Throws NotFound, ResourceExhausted, or InvalidArgument when the file was changed in place.
  std::shared_ptr<const HostDelta> get(std::int32_t handle);
  std::size_t host_bytes() const;  // kept in host memory within the budget

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltazip
