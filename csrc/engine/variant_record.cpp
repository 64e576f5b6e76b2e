#include "engine/variant_record.h"

#include <algorithm>
#include <string_view>

namespace deltazip::engine {
namespace {

constexpr std::size_t kMaxNameLength = 128;

bool is_name_character(char c) {
  return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ||
         std::string_view("._:@-").find(c) != std::string_view::npos;
}

std::string_view name_of(VariantRecord::Place place) {
  switch (place) {
    case VariantRecord::Place::kDisk:
      return "disk";
    case VariantRecord::Place::kHost:
      return "host";
    case VariantRecord::Place::kLoading:
      return "loading";
    case VariantRecord::Place::kResident:
      return "resident";
  }
  return "";
}

}  // namespace

VariantInfo VariantRecord::info() const {
  VariantInfo info;
  info.name = name;
  info.path = path;
  info.parent = parent;
  info.content_digest = content_digest.hex();
  info.state = is_draining ? "draining" : name_of(place);
  info.file_bytes = file_bytes;
  info.device_bytes = device_bytes;
  info.num_requests = num_requests;
  info.num_running = num_running;
  info.num_waiting = num_waiting;
  info.num_prompt_tokens = num_prompt_tokens;
  info.num_output_tokens = num_output_tokens;
  info.num_loads = num_loads;
  info.num_evictions = num_evictions;
  info.load_seconds = load_seconds;
  info.manifest_json = manifest_json;
  return info;
}

void check_variant_name(const std::string& name) {
  DZ_CHECK(!name.empty() && name.size() <= kMaxNameLength && name.front() != '.' &&
               std::ranges::all_of(name, is_name_character),
           "a variant's name is 1 to ", kMaxNameLength,
           " of A-Z a-z 0-9 . _ : @ - and does not begin with a dot, got '",
           name.substr(0, kMaxNameLength), "'");
}

}  // namespace deltazip::engine
