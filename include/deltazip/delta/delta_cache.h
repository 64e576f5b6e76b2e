#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "deltazip/delta/delta_store.h"

namespace deltazip {

// A delta on the device: HostDelta's parts, at `base`.
struct DeviceDelta {
  std::shared_ptr<const HostDelta> host;
  Buffer bytes;                     // empty where the backend shares host memory
  const std::byte* base = nullptr;  // where parts[i].offset counts from

  const DeltaPart* find(std::string_view name) const;  // nullptr: no such tensor
  DeltaMatrix matrix(const DeltaPart& part) const;     // part.kind == kMatrix
  const float* replaced(const DeltaPart& part) const;  // part.kind == kReplaced
};

// The bytes in the device's slots. Obeys DeltaSlots; decides nothing. Engine thread; loads run on
// a thread and a stream of its own, in order, and never stall the caller. That thread calls the
// backend's allocate, allocate_host, tile_delta and, on its own stream, copy_to_device.
class DeltaCache {
 public:
  DeltaCache(Backend& backend, DeltaStore& store, std::int32_t num_slots);
  ~DeltaCache();  // waits for loads under way

  struct Finished {
    std::int32_t slot;
    std::string error;  // empty: resident
    double seconds;     // from begin_load
  };

  // What the slot held is dropped. Every failure of the load itself comes out of poll().
  void begin_load(std::int32_t slot, std::int32_t store_handle);
  std::vector<Finished> poll();  // never blocks; a slot becomes resident here
  bool wait(int timeout_ms);     // until poll() has news; false: timed out, or nothing is loading
  void drop(std::int32_t slot);  // frees its bytes; not while loading
  const DeviceDelta* get(std::int32_t slot) const;  // nullptr: not resident

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltazip
