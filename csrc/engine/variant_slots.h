#pragma once

#include <memory>
#include <string>
#include <vector>

#include "deltazip/delta/delta_cache.h"
#include "deltazip/model/model.h"
#include "engine/variant_record.h"

namespace deltazip::engine {

// Which variant lies in which slot, bound to the model. Carries out the scheduler's loads with the
// delta cache; decides nothing. Engine thread.
class VariantSlots {
 public:
  VariantSlots(DeltaCache& cache, const Model& model, std::int32_t num_slots)
      : cache_(cache), model_(model), slots_(static_cast<std::size_t>(num_slots)) {}

  struct Finished {
    SlotId slot;
    std::string error;  // empty: resident
  };

  void begin(const DeltaLoad& load, std::shared_ptr<VariantRecord> variant);
  std::vector<Finished> poll();                      // never blocks
  const VariantWeights* weights(SlotId slot) const;  // kNoSlot: the base; throws if not resident
  bool is_loading() const;                           // any
  bool is_loading(VariantId variant) const;
  void drop(VariantId variant);  // it was removed; not while loading

 private:
  struct Slot {
    std::shared_ptr<VariantRecord> variant;         // nullptr: empty
    std::shared_ptr<const VariantWeights> weights;  // nullptr: loading
  };

  Slot& at(SlotId slot) { return slots_[static_cast<std::size_t>(slot)]; }
  void clear(SlotId slot);

  DeltaCache& cache_;
  const Model& model_;
  std::vector<Slot> slots_;
};

}  // namespace deltazip::engine
