#include "deltazip/schedule/delta_slots.h"

#include <algorithm>

#include "deltazip/base/error.h"

namespace deltazip {

DeltaSlots::DeltaSlots(std::int32_t num_slots, std::int64_t budget_bytes)
    : budget_bytes_(budget_bytes) {
  DZ_CHECK(num_slots >= 0, "the number of delta slots must not be negative, got ", num_slots);
  DZ_CHECK(budget_bytes >= 0, "the delta budget must not be negative, got ", budget_bytes,
           " bytes");
  slots_.resize(static_cast<std::size_t>(num_slots));
}

DeltaSlots::Slot& DeltaSlots::at(SlotId slot) {
  DZ_INTERNAL(slot >= 0 && slot < num_slots(), "delta slot ", slot, " of ", num_slots());
  return slots_[static_cast<std::size_t>(slot)];
}

const DeltaSlots::Slot& DeltaSlots::at(SlotId slot) const {
  DZ_INTERNAL(slot >= 0 && slot < num_slots(), "delta slot ", slot, " of ", num_slots());
  return slots_[static_cast<std::size_t>(slot)];
}

void DeltaSlots::clear(Slot& slot) {
  by_variant_.erase(slot.variant);
  used_bytes_ -= slot.num_bytes;
  slot = Slot{};
}

std::optional<SlotId> DeltaSlots::find(VariantId variant) const {
  const auto found = by_variant_.find(variant);
  if (found == by_variant_.end()) return std::nullopt;
  return found->second;
}

DeltaSlots::State DeltaSlots::state(SlotId slot) const { return at(slot).state; }

std::optional<DeltaSlots::Load> DeltaSlots::begin_load(VariantId variant, std::int64_t num_bytes) {
  DZ_INTERNAL(variant != kBaseVariant && !by_variant_.contains(variant), "variant ", variant,
              " needs no load: it is the base or has a slot");
  DZ_INTERNAL(num_bytes >= 0, "a delta of ", num_bytes, " bytes");
  SlotId empty = kNoSlot;
  std::vector<SlotId> idle;
  for (SlotId slot = num_slots() - 1; slot >= 0; --slot) {
    if (at(slot).state == State::kEmpty) empty = slot;
    if (at(slot).state == State::kResident && at(slot).num_pins == 0) idle.push_back(slot);
  }
  std::sort(idle.begin(), idle.end(),
            [this](SlotId a, SlotId b) { return at(a).last_used < at(b).last_used; });

  std::int64_t room = free_bytes();
  std::vector<SlotId> evicted;
  for (const SlotId slot : idle) {
    if (room >= num_bytes && (empty != kNoSlot || !evicted.empty())) break;
    evicted.push_back(slot);
    room += at(slot).num_bytes;
  }
  if (room < num_bytes || (empty == kNoSlot && evicted.empty())) return std::nullopt;
  // A large one taken late may have made earlier, smaller ones needless: those stay.
  for (std::size_t i = evicted.size(); i-- > 0;) {
    const std::int64_t without = room - at(evicted[i]).num_bytes;
    if (without < num_bytes || (empty == kNoSlot && evicted.size() == 1)) continue;
    room = without;
    evicted.erase(evicted.begin() + static_cast<std::ptrdiff_t>(i));
  }
  for (const SlotId slot : evicted) clear(at(slot));

  const SlotId slot = empty != kNoSlot ? empty : evicted.front();
  at(slot) = Slot{State::kLoading, variant, num_bytes, 0, ++clock_};
  by_variant_.emplace(variant, slot);
  used_bytes_ += num_bytes;
  return Load{slot, variant, std::move(evicted)};
}

void DeltaSlots::finish_load(SlotId slot) {
  DZ_INTERNAL(at(slot).state == State::kLoading, "delta slot ", slot, " is not loading");
  at(slot).state = State::kResident;
  at(slot).last_used = ++clock_;
}

void DeltaSlots::fail_load(SlotId slot) {
  DZ_INTERNAL(at(slot).state == State::kLoading, "delta slot ", slot, " is not loading");
  clear(at(slot));
}

void DeltaSlots::pin(SlotId slot) {
  DZ_INTERNAL(at(slot).state == State::kResident, "delta slot ", slot, " is not resident");
  ++at(slot).num_pins;
}

void DeltaSlots::unpin(SlotId slot) {
  DZ_INTERNAL(at(slot).num_pins > 0, "delta slot ", slot, " has no pin");
  --at(slot).num_pins;
}

void DeltaSlots::touch(SlotId slot) {
  DZ_INTERNAL(at(slot).state == State::kResident, "delta slot ", slot, " is not resident");
  at(slot).last_used = ++clock_;
}

void DeltaSlots::remove(VariantId variant) {
  const std::optional<SlotId> slot = find(variant);
  if (!slot) return;
  DZ_INTERNAL(at(*slot).state == State::kResident && at(*slot).num_pins == 0, "variant ", variant,
              " is removed from slot ", *slot, " while it is loading or in use");
  clear(at(*slot));
}

std::int32_t DeltaSlots::num_slots() const { return static_cast<std::int32_t>(slots_.size()); }
std::int64_t DeltaSlots::free_bytes() const { return budget_bytes_ - used_bytes_; }
std::int64_t DeltaSlots::num_bytes(SlotId slot) const { return at(slot).num_bytes; }
std::int32_t DeltaSlots::num_pins(SlotId slot) const { return at(slot).num_pins; }

void DeltaSlots::check() const {
  std::int64_t used = 0;
  std::size_t num_used = 0;
  for (SlotId slot = 0; slot < num_slots(); ++slot) {
    const Slot& entry = at(slot);
    used += entry.num_bytes;
    DZ_INTERNAL(entry.num_pins == 0 || (entry.num_pins > 0 && entry.state == State::kResident),
                "delta slot ", slot, " has ", entry.num_pins, " pins");
    if (entry.state == State::kEmpty) {
      DZ_INTERNAL(entry.num_bytes == 0, "empty delta slot ", slot, " holds ", entry.num_bytes);
      continue;
    }
    ++num_used;
    DZ_INTERNAL(find(entry.variant) == slot, "variant ", entry.variant, " is not found in slot ",
                slot);
  }
  DZ_INTERNAL(num_used == by_variant_.size(), by_variant_.size(), " variants in ", num_used,
              " slots");
  DZ_INTERNAL(used == used_bytes_ && used <= budget_bytes_, used, " bytes in slots, ledger ",
              used_bytes_, ", budget ", budget_bytes_);
}

}  // namespace deltazip
