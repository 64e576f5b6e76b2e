#include "deltazip/delta/delta_cache.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

using Clock = std::chrono::steady_clock;

// 80 us of the bus. A step's own small copies wait for the piece that is moving, several times a
// step: pieces of 50 MB made its steps 1.4 times as long.
constexpr std::size_t kPieceBytes = std::size_t{4} << 20;

enum class State : std::uint8_t { kEmpty, kLoading, kResident };

struct Slot {
  State state = State::kEmpty;
  DeviceDelta delta;
};

struct Order {
  std::int32_t slot = 0;
  std::int32_t handle = 0;
  Clock::time_point begun;
};

struct Result {
  DeltaCache::Finished finished;
  DeviceDelta delta;
};

}  // namespace

struct DeltaCache::Impl {
  Backend& backend;
  DeltaStore& store;
  std::vector<Slot> slots;         // engine thread only
  std::unique_ptr<Stream> stream;  // loader thread only; none where memory is shared

  std::mutex mutex;
  std::condition_variable has_order, has_result;
  std::deque<Order> orders;     // under mutex
  std::vector<Result> results;  // under mutex
  std::size_t num_loading = 0;  // under mutex: ordered and not yet in results
  bool is_stopping = false;     // under mutex
  std::thread loader;

  Impl(Backend& backend_in, DeltaStore& store_in, std::int32_t num_slots)
      : backend(backend_in), store(store_in), slots(static_cast<std::size_t>(num_slots)) {
    if (!backend.shares_host_memory()) stream = backend.create_stream();
    loader = std::thread([this] { run(); });
  }

  ~Impl() {
    {
      const std::lock_guard lock(mutex);
      is_stopping = true;
      orders.clear();
    }
    has_order.notify_all();
    loader.join();
  }

  Slot& at(std::int32_t slot) {
    DZ_CHECK(slot >= 0 && static_cast<std::size_t>(slot) < slots.size(), "delta slot ", slot,
             " of ", slots.size());
    return slots[static_cast<std::size_t>(slot)];
  }

  void run();
  DeviceDelta load(std::int32_t handle);
  void copy(std::byte* device, const HostDelta& host);
};

void DeltaCache::Impl::run() {
  std::unique_lock lock(mutex);
  while (true) {
    has_order.wait(lock, [&] { return is_stopping || !orders.empty(); });
    if (is_stopping) return;
    const Order order = orders.front();
    orders.pop_front();
    lock.unlock();
    Result result{{order.slot, "", 0.0}, {}};
    try {
      result.delta = load(order.handle);
    } catch (const std::exception& error) {
      result.finished.error = error.what();
      if (result.finished.error.empty()) result.finished.error = "unknown error";
    }
    result.finished.seconds = std::chrono::duration<double>(Clock::now() - order.begun).count();
    lock.lock();
    results.push_back(std::move(result));
    --num_loading;
    has_result.notify_all();
  }
}

DeviceDelta DeltaCache::Impl::load(std::int32_t handle) {
  DeviceDelta delta;
  delta.host = store.get(handle);
  const Buffer& host = delta.host->bytes;
  delta.base = static_cast<const std::byte*>(host.data());
  if (backend.shares_host_memory() || host.num_bytes() == 0) return delta;

  delta.bytes = backend.allocate(host.num_bytes());
  auto* device = static_cast<std::byte*>(delta.bytes.data());
  try {
    copy(device, *delta.host);
  } catch (...) {
    stream->synchronize();  // what was given still writes to delta.bytes
    throw;
  }
  delta.base = device;
  return delta;
}

// One piece at a time: between two of them the bus is free for a moment. With always a next one
// queued, a step's own small copies waited until the whole delta was there, 33 ms of a 1.7 GB one.
void DeltaCache::Impl::copy(std::byte* device, const HostDelta& host) {
  const auto* from = static_cast<const std::byte*>(host.bytes.data());
  const std::size_t num_bytes = host.bytes.num_bytes();
  for (std::size_t at = 0; at < num_bytes; at += kPieceBytes) {
    backend.copy_to_device(device + at, from + at, std::min(kPieceBytes, num_bytes - at), *stream);
    stream->synchronize();
  }
}

DeltaCache::DeltaCache(Backend& backend, DeltaStore& store, std::int32_t num_slots) {
  DZ_CHECK(num_slots >= 0, "a delta cache of ", num_slots, " slots");
  impl_ = std::make_unique<Impl>(backend, store, num_slots);
}

DeltaCache::~DeltaCache() = default;

void DeltaCache::begin_load(std::int32_t slot, std::int32_t store_handle) {
  Slot& target = impl_->at(slot);
  DZ_INTERNAL(target.state != State::kLoading, "slot ", slot, " is being loaded already");
  target.delta = {};
  target.state = State::kLoading;
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->orders.push_back({slot, store_handle, Clock::now()});
    ++impl_->num_loading;
  }
  impl_->has_order.notify_one();
}

std::vector<DeltaCache::Finished> DeltaCache::poll() {
  std::vector<Result> results;
  {
    const std::lock_guard lock(impl_->mutex);
    results.swap(impl_->results);
  }
  std::vector<Finished> finished;
  finished.reserve(results.size());
  for (Result& result : results) {
    Slot& slot = impl_->at(result.finished.slot);
    slot.state = result.finished.error.empty() ? State::kResident : State::kEmpty;
    slot.delta = std::move(result.delta);
    finished.push_back(std::move(result.finished));
  }
  return finished;
}

bool DeltaCache::wait(int timeout_ms) {
  std::unique_lock lock(impl_->mutex);
  impl_->has_result.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                             [&] { return !impl_->results.empty() || impl_->num_loading == 0; });
  return !impl_->results.empty();
}

void DeltaCache::drop(std::int32_t slot) {
  Slot& target = impl_->at(slot);
  DZ_INTERNAL(target.state != State::kLoading, "slot ", slot, " is being loaded");
  target.state = State::kEmpty;
  target.delta = {};
}

const DeviceDelta* DeltaCache::get(std::int32_t slot) const {
  const Slot& found = impl_->at(slot);
  return found.state == State::kResident ? &found.delta : nullptr;
}

const DeltaPart* DeviceDelta::find(std::string_view name) const { return host->find(name); }

DeltaMatrix DeviceDelta::matrix(const DeltaPart& part) const {
  DZ_INTERNAL(part.kind == DeltaKind::kMatrix, part.name, " is not a compressed matrix");
  DeltaMatrix matrix = part.matrix;
  matrix.data = base + part.offset;
  return matrix;
}

const float* DeviceDelta::replaced(const DeltaPart& part) const {
  DZ_INTERNAL(part.kind == DeltaKind::kReplaced, part.name, " is not a replaced tensor");
  return reinterpret_cast<const float*>(base + part.offset);
}

}  // namespace deltazip
