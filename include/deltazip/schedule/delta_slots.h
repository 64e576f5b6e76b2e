#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "deltazip/schedule/types.h"

namespace deltazip {

// Who has which delta slot. Host integers only; the bytes live in DeltaCache. Engine thread.
// Slots share a byte budget: a load evicts idle slots, least recently used first, until it fits.
class DeltaSlots {
 public:
  DeltaSlots(std::int32_t num_slots, std::int64_t budget_bytes);

  enum class State : std::uint8_t { kEmpty, kLoading, kResident };

  struct Load {
    SlotId slot;
    VariantId variant;
    std::vector<SlotId> evicted;  // emptied to make room; their bytes may be dropped
  };

  std::optional<SlotId> find(VariantId variant) const;  // loading or resident
  State state(SlotId slot) const;
  // Orders a load; nullopt when everything that could be evicted is pinned or too small.
  std::optional<Load> begin_load(VariantId variant, std::int64_t num_bytes);
  void finish_load(SlotId slot);
  void fail_load(SlotId slot);
  void pin(SlotId slot);  // a running sequence uses it: not evicted
  void unpin(SlotId slot);
  void touch(SlotId slot);         // used in this step
  void remove(VariantId variant);  // unloaded by the operator; must not be pinned
  void check() const;

 private:
  // ... (the owner of this folder fills this in)
};

}  // namespace deltazip
