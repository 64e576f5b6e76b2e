#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
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

  std::int32_t num_slots() const;
  std::int64_t free_bytes() const;
  std::int64_t num_bytes(SlotId slot) const;  // 0 when empty
  std::int32_t num_pins(SlotId slot) const;
  void check() const;  // throws InternalError

 private:
  struct Slot {
    State state = State::kEmpty;
    VariantId variant = kBaseVariant;
    std::int64_t num_bytes = 0;
    std::int32_t num_pins = 0;
    std::uint64_t last_used = 0;
  };
  Slot& at(SlotId slot);
  const Slot& at(SlotId slot) const;
  void clear(Slot& slot);

  std::vector<Slot> slots_;
  std::unordered_map<VariantId, SlotId> by_variant_;
  std::int64_t budget_bytes_, used_bytes_ = 0;
  std::uint64_t clock_ = 0;  // of uses
};

}  // namespace deltazip
