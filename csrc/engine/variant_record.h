#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "deltazip/base/digest.h"
#include "deltazip/engine/engine.h"

namespace deltazip::engine {

// What the engine knows of one variant. The first part never changes; the counters are written by
// the engine's thread and read by any.
struct VariantRecord {
  std::string name;
  std::string path;
  std::string parent;  // empty: this is the base
  VariantId id = kBaseVariant;
  std::int32_t store_handle = -1;  // -1: the base
  Digest content_digest;
  std::int64_t file_bytes = 0, device_bytes = 0;
  std::string manifest_json;
  std::vector<std::int32_t> eos_token_ids;

  enum class Place : std::uint8_t { kDisk, kHost, kLoading, kResident };
  std::atomic<Place> place{Place::kDisk};
  std::atomic<bool> is_draining{false};
  std::atomic<std::int64_t> num_requests{0}, num_running{0}, num_waiting{0}, num_prompt_tokens{0},
      num_output_tokens{0}, num_loads{0}, num_evictions{0};
  std::atomic<double> load_seconds{0.0};

  VariantInfo info() const;
};

// Throws InvalidArgument unless it is 1 to 128 of [A-Za-z0-9._:@-] and does not begin with a dot.
void check_variant_name(const std::string& name);

}  // namespace deltazip::engine
