#include "engine/variant_slots.h"

#include <algorithm>
#include <utility>

namespace deltazip::engine {

using Place = VariantRecord::Place;

void VariantSlots::clear(SlotId slot) {
  Slot& old = at(slot);
  if (!old.variant) return;
  old.variant->place = Place::kHost;
  old.variant.reset();
  old.weights.reset();  // points into the bytes that go now
  cache_.drop(slot);
}

void VariantSlots::begin(const DeltaLoad& load, std::shared_ptr<VariantRecord> variant) {
  for (const SlotId slot : load.evicted) {
    if (at(slot).variant) ++at(slot).variant->num_evictions;
    clear(slot);
  }
  clear(load.slot);
  variant->place = Place::kLoading;
  cache_.begin_load(load.slot, variant->store_handle);
  at(load.slot).variant = std::move(variant);
}

std::vector<VariantSlots::Finished> VariantSlots::poll() {
  std::vector<Finished> finished;
  for (DeltaCache::Finished& load : cache_.poll()) {
    VariantRecord& variant = *at(load.slot).variant;
    if (load.error.empty()) {
      try {
        at(load.slot).weights = model_.bind(*cache_.get(load.slot));
        variant.place = Place::kResident;
        variant.load_seconds = load.seconds;
        ++variant.num_loads;
      } catch (const std::exception& error) {
        load.error = error.what();
      }
    }
    if (!load.error.empty()) {
      load.error = detail::concat("variant '", variant.name, "' could not be loaded: ", load.error);
      clear(load.slot);
    }
    finished.push_back({load.slot, std::move(load.error)});
  }
  return finished;
}

const VariantWeights* VariantSlots::weights(SlotId slot) const {
  if (slot == kNoSlot) return model_.base();
  const Slot& found = slots_.at(static_cast<std::size_t>(slot));
  DZ_INTERNAL(found.weights != nullptr, "slot ", slot, " is in a batch but holds no delta");
  return found.weights.get();
}

bool VariantSlots::is_loading() const {
  return std::ranges::any_of(slots_, [](const Slot& s) { return s.variant && !s.weights; });
}

bool VariantSlots::is_loading(VariantId variant) const {
  return std::ranges::any_of(
      slots_, [&](const Slot& s) { return s.variant && s.variant->id == variant && !s.weights; });
}

void VariantSlots::drop(VariantId variant) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].variant && slots_[i].variant->id == variant) clear(static_cast<SlotId>(i));
  }
}

}  // namespace deltazip::engine
