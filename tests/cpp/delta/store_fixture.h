#pragma once

#include <string>
#include <vector>

#include "delta/delta_builder.h"
#include "delta/fake_backend.h"
#include "deltazip/delta/delta_store.h"

namespace deltazip::test {

// Some variants on disk, all of one base, each with bytes of its own.
struct Variants {
  TemporaryFolder folder;
  std::vector<std::filesystem::path> paths;
  std::vector<BaseTensor> base;
  Digest base_digest;

  explicit Variants(int count) {
    for (int i = 0; i < count; ++i) {
      paths.push_back(folder.path() / ("v" + std::to_string(i)));
      std::filesystem::create_directory(paths.back());
      write_file(file(i), small_delta(static_cast<std::uint32_t>(i + 1)).str());
    }
    const AlignedBytes bytes(small_delta().str());
    const auto any = DeltaFile::parse(bytes.span(), "any");
    for (const DeltaTensor& tensor : any->tensors()) base.push_back({tensor.name, tensor.shape});
    base_digest = any->base_digest();
  }
  std::filesystem::path file(int i) const {
    return paths[static_cast<std::size_t>(i)] / "delta.safetensors";
  }
};

}  // namespace deltazip::test
