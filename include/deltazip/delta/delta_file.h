#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "deltazip/backend/delta_matrix.h"
#include "deltazip/base/digest.h"
#include "deltazip/io/safetensors.h"

namespace deltazip {

// How a base tensor appears in a delta.
enum class DeltaKind : std::uint8_t {
  kUnchanged,  // equal to the base's; no bytes
  kReplaced,   // the fine-tune's own values, exact (norms, biases, anything small)
  kMatrix,     // a compressed difference; see DeltaSource
};

struct DeltaTensor {
  std::string name;  // of the base tensor, e.g. "model.layers.0.mlp.up_proj.weight"
  DeltaKind kind = DeltaKind::kUnchanged;
  Shape shape;  // the base tensor's
  // Of a packed file only load() has bytes: as they come from tensors() these have none.
  ConstTensorView replaced;  // kReplaced
  DeltaSource matrix;        // kMatrix
};

// A delta file, plain or packed, opened and fully validated (docs/delta_format.md): format version,
// tensor table, sizes, code ranges, finite scales, and the content digest. Every failure is an
// InvalidArgument naming file, tensor, what was expected and what came.
class DeltaFile {
 public:
  static std::shared_ptr<const DeltaFile> open(const std::filesystem::path& folder_or_file);
  static std::shared_ptr<const DeltaFile> parse(std::span<const std::byte> bytes, std::string name);

  const std::vector<DeltaTensor>& tensors() const;  // by name
  const DeltaTensor* find(std::string_view name) const;
  const Digest& base_digest() const;     // Checkpoint::weights_digest of the base it was made from
  const Digest& content_digest() const;  // of everything that changes an answer; checked
  const std::string& manifest_json() const;
  std::size_t num_bytes() const;
  const std::string& name() const;  // the path, as given

  // `tensor` with its bytes read (and decoded) to `storage`, which grows as needed and must outlive
  // the result. Thread-safe, each thread with a storage of its own.
  // Reads the file, not the mapping: one cut short since open() is an InvalidArgument here.
  DeltaTensor load(const DeltaTensor& tensor, std::vector<std::byte>& storage) const;
  // Throws InvalidArgument when the file on disk was changed in place since open().
  void check_unchanged() const;

 private:
  DeltaFile();
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

// Throws InvalidArgument unless `file` was made from this base (digest) and covers exactly its
// tensors: none missing, none unknown, each of the base's shape.
struct BaseTensor {
  std::string name;
  Shape shape;
};
void check_matches_base(const DeltaFile& file, const Digest& base_digest,
                        const std::vector<BaseTensor>& base_tensors);

}  // namespace deltazip
