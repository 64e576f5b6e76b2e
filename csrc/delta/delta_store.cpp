#include "deltazip/delta/delta_store.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <utility>

#include "delta/layout.h"
#include "deltazip/base/error.h"
#include "deltazip/base/thread_pool.h"
#include "deltazip/io/json_text.h"

namespace deltazip {
namespace {

using HostPointer = std::shared_ptr<const HostDelta>;

struct Entry {
  std::shared_ptr<const DeltaFile> file;
  DeltaSummary summary;
  DeltaLayout layout;

  std::mutex load_mutex;  // held while tiling: a second get() waits instead of tiling too
  // Below: under the store's mutex.
  HostPointer kept;                     // counts against the budget
  std::weak_ptr<const HostDelta> used;  // found again while a slot holds it, though evicted
  std::uint64_t last_use = 0;
};

std::int32_t count_layers(const std::vector<BaseTensor>& tensors) {
  std::int32_t num_layers = 0;
  for (const BaseTensor& tensor : tensors) {
    const std::int32_t layer = layer_of(tensor.name);
    DZ_CHECK(layer < static_cast<std::int64_t>(tensors.size()), "tensor '", printable(tensor.name),
             "' is of layer ", layer, ", but the base has only ", tensors.size(), " tensors");
    num_layers = std::max(num_layers, layer + 1);
  }
  return num_layers;
}

void write_floats(float* out, const ConstTensorView& view) {
  const auto count = static_cast<std::size_t>(view.num_elements());
  if (count == 0) return;
  if (view.dtype == DType::kFloat32) {
    std::memcpy(out, view.data, count * sizeof(float));
    return;
  }
  const auto* words = static_cast<const std::uint16_t*>(view.data);
  const bool is_half = view.dtype == DType::kFloat16;
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = is_half ? to_float(Half{words[i]}) : to_float(BFloat16{words[i]});
  }
}

HostPointer tile(Backend& backend, const Entry& entry, int num_threads) {
  const DeltaFile& file = *entry.file;
  file.check_unchanged();
  auto host = std::make_shared<HostDelta>();
  host->content_digest = entry.summary.content_digest;
  host->parts = entry.layout.parts;
  if (entry.layout.num_bytes > 0) host->bytes = backend.allocate_host(entry.layout.num_bytes);
  auto* bytes = static_cast<std::byte*>(host->bytes.data());

  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < host->parts.size(); ++i) {
    if (host->parts[i].num_bytes > 0) order.push_back(i);
  }
  std::ranges::stable_sort(order, std::greater(),
                           [&](std::size_t i) { return host->parts[i].num_bytes; });
  const auto count = static_cast<std::int64_t>(order.size());
  ThreadPool pool(static_cast<int>(std::clamp<std::int64_t>(count, 1, num_threads)));
  pool.parallel_for(count, 1, [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<std::byte> storage;
    for (std::int64_t at = begin; at < end; ++at) {
      const std::size_t index = order[static_cast<std::size_t>(at)];
      const DeltaPart& part = host->parts[index];
      const DeltaTensor tensor = file.load(file.tensors()[index], storage);
      if (part.kind == DeltaKind::kMatrix) {
        backend.tile_delta(bytes + part.offset, tensor.matrix);
      } else {
        write_floats(reinterpret_cast<float*>(bytes + part.offset), tensor.replaced);
      }
    }
  });
  file.check_unchanged();  // what was validated is what was read
  return host;
}

}  // namespace

struct DeltaStore::Impl {
  Backend& backend;
  const Digest base_digest;
  const std::vector<BaseTensor> base_tensors;
  const std::int32_t num_layers;
  const std::size_t budget_bytes;
  const int num_threads;

  mutable std::mutex mutex;
  std::map<std::int32_t, std::shared_ptr<Entry>> entries;
  std::int32_t next_handle = 0;
  std::uint64_t clock = 0;
  std::size_t host_bytes = 0;

  // Under the mutex.
  const std::shared_ptr<Entry>& at(std::int32_t handle) const {
    const auto found = entries.find(handle);
    if (found == entries.end()) detail::fail<NotFound>("no delta has handle ", handle);
    return found->second;
  }

  // Under the mutex. What is thrown out goes to `evicted`, to be freed without it.
  void keep(Entry& entry, const HostPointer& host, std::vector<HostPointer>& evicted) {
    entry.last_use = ++clock;
    if (!entry.kept) {
      entry.kept = host;
      host_bytes += entry.summary.tiled_bytes;
    }
    while (budget_bytes > 0 && host_bytes > budget_bytes) {
      Entry* oldest = nullptr;
      for (const auto& [handle, other] : entries) {
        if (other->kept && (oldest == nullptr || other->last_use < oldest->last_use)) {
          oldest = other.get();
        }
      }
      host_bytes -= oldest->summary.tiled_bytes;
      evicted.push_back(std::exchange(oldest->kept, nullptr));
    }
  }
};

DeltaStore::DeltaStore(Backend& backend, Digest base_digest, std::vector<BaseTensor> base_tensors,
                       std::size_t host_budget_bytes, int num_threads) {
  DZ_CHECK(num_threads >= 1, "DeltaStore: num_threads must be at least 1, got ", num_threads);
  const std::int32_t num_layers = count_layers(base_tensors);
  impl_.reset(new Impl{.backend = backend,
                       .base_digest = base_digest,
                       .base_tensors = std::move(base_tensors),
                       .num_layers = num_layers,
                       .budget_bytes = host_budget_bytes,
                       .num_threads = num_threads,
                       .mutex = {},
                       .entries = {}});
}

DeltaStore::~DeltaStore() = default;

std::int32_t DeltaStore::add(const std::filesystem::path& path) {
  auto entry = std::make_shared<Entry>();
  entry->file = DeltaFile::open(path);
  check_matches_base(*entry->file, impl_->base_digest, impl_->base_tensors);
  entry->layout = make_layout(impl_->backend, *entry->file, impl_->num_layers);
  entry->summary = {path.string(), entry->file->content_digest(), entry->file->num_bytes(),
                    entry->layout.num_bytes, entry->file->manifest_json()};
  const std::lock_guard lock(impl_->mutex);
  impl_->entries.emplace(impl_->next_handle, std::move(entry));
  return impl_->next_handle++;
}

const DeltaSummary& DeltaStore::summary(std::int32_t handle) const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->at(handle)->summary;
}

std::shared_ptr<const DeltaFile> DeltaStore::file(std::int32_t handle) const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->at(handle)->file;
}

void DeltaStore::remove(std::int32_t handle) {
  std::shared_ptr<Entry> removed;  // freed after the lock
  const std::lock_guard lock(impl_->mutex);
  removed = impl_->at(handle);
  if (removed->kept) impl_->host_bytes -= removed->summary.tiled_bytes;
  impl_->entries.erase(handle);
}

std::shared_ptr<const HostDelta> DeltaStore::get(std::int32_t handle) {
  std::shared_ptr<Entry> entry;
  {
    const std::lock_guard lock(impl_->mutex);
    entry = impl_->at(handle);
  }
  std::vector<HostPointer> evicted;
  const std::lock_guard loading(entry->load_mutex);
  {
    const std::lock_guard lock(impl_->mutex);
    HostPointer host = entry->kept ? entry->kept : entry->used.lock();
    if (host) {
      if (impl_->entries.contains(handle)) impl_->keep(*entry, host, evicted);
      return host;
    }
  }
  HostPointer host = tile(impl_->backend, *entry, impl_->num_threads);
  const std::lock_guard lock(impl_->mutex);
  entry->used = host;
  if (impl_->entries.contains(handle)) impl_->keep(*entry, host, evicted);
  return host;
}

std::size_t DeltaStore::host_bytes() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->host_bytes;
}

const DeltaPart* HostDelta::find(std::string_view name) const {
  const auto found =
      std::lower_bound(parts.begin(), parts.end(), name,
                       [](const DeltaPart& part, std::string_view key) { return part.name < key; });
  return found != parts.end() && found->name == name ? &*found : nullptr;
}

}  // namespace deltazip
