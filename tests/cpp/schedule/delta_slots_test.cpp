#include "deltazip/schedule/delta_slots.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

using State = DeltaSlots::State;

struct Held {
  VariantId variant;
  std::int64_t num_bytes;
  bool is_resident = false;
  int num_pins = 0;
  int last_used = 0;
};

struct Model {
  std::map<SlotId, Held> held;
  std::int64_t used() const {
    std::int64_t sum = 0;
    for (const auto& [slot, entry] : held) sum += entry.num_bytes;
    return sum;
  }
};

TEST(DeltaSlots, RandomWalkMatchesThePlainModel) {
  std::mt19937 rng(3);
  constexpr std::int64_t kBudget = 100;
  for (const std::int32_t num_slots : {1, 2, 5, 9}) {
    DeltaSlots slots(num_slots, kBudget);
    Model model;
    int now = 0, num_loads = 0, num_refused = 0, num_evicted = 0;
    const auto draw = [&](std::int32_t n) {
      return static_cast<std::int32_t>(rng() % static_cast<std::uint32_t>(n));
    };
    for (int i = 0; i < 20000; ++i) {
      const VariantId variant = 1 + draw(15);
      const SlotId slot = draw(num_slots);
      const auto entry = model.held.find(slot);
      const bool is_held = entry != model.held.end();
      switch (draw(7)) {
        case 0: {
          if (slots.find(variant)) break;
          const std::int64_t num_bytes = draw(110);
          std::int64_t evictable = 0;
          bool has_slot = static_cast<std::int32_t>(model.held.size()) < num_slots;
          const bool had_empty = has_slot;
          for (const auto& [id, held] : model.held) {
            if (!held.is_resident || held.num_pins > 0) continue;
            evictable += held.num_bytes;
            has_slot = true;
          }
          const bool is_possible = has_slot && kBudget - model.used() + evictable >= num_bytes;
          const auto load = slots.begin_load(variant, num_bytes);
          ASSERT_EQ(load.has_value(), is_possible);
          if (!load) {
            ++num_refused;
            break;
          }
          ++num_loads;
          int newest_evicted = -1;
          for (const SlotId evicted : load->evicted) {
            const Held& gone = model.held.at(evicted);
            ASSERT_TRUE(gone.is_resident && gone.num_pins == 0);
            newest_evicted = std::max(newest_evicted, gone.last_used);
            ++num_evicted;
          }
          // None is evicted for nothing: without any one of them it would not fit.
          std::int64_t freed = 0;
          for (const SlotId evicted : load->evicted) freed += model.held.at(evicted).num_bytes;
          for (const SlotId evicted : load->evicted) {
            const std::int64_t without = freed - model.held.at(evicted).num_bytes;
            ASSERT_TRUE(kBudget - model.used() + without < num_bytes ||
                        (!had_empty && load->evicted.size() == 1));
          }
          // A single eviction that had a choice of equals takes the least recently used.
          if (load->evicted.size() == 1 && kBudget - model.used() >= num_bytes) {
            for (const auto& [id, held] : model.held) {
              if (held.is_resident && held.num_pins == 0) {
                ASSERT_LE(newest_evicted, held.last_used);
              }
            }
          }
          for (const SlotId evicted : load->evicted) model.held.erase(evicted);
          ASSERT_FALSE(model.held.contains(load->slot));
          ASSERT_EQ(load->variant, variant);
          model.held[load->slot] = {variant, num_bytes, false, 0, ++now};
          break;
        }
        case 1:
          if (!is_held || entry->second.is_resident) {
            ASSERT_THROW(slots.finish_load(slot), InternalError);
            break;
          }
          if (draw(4) == 0) {
            slots.fail_load(slot);
            model.held.erase(entry);
          } else {
            slots.finish_load(slot);
            entry->second.is_resident = true;
            entry->second.last_used = ++now;
          }
          break;
        case 2:
          if (!is_held || !entry->second.is_resident) {
            ASSERT_THROW(slots.pin(slot), InternalError);
          } else {
            slots.pin(slot);
            ++entry->second.num_pins;
          }
          break;
        case 3:
        case 4:
        case 5:
          if (!is_held || entry->second.num_pins == 0) {
            ASSERT_THROW(slots.unpin(slot), InternalError);
          } else {
            slots.unpin(slot);
            --entry->second.num_pins;
          }
          break;
        case 6:
          if (!is_held || !entry->second.is_resident) break;
          if (entry->second.num_pins > 0) {
            ASSERT_THROW(slots.remove(entry->second.variant), InternalError);
          } else if (draw(4) == 0) {
            slots.remove(entry->second.variant);
            model.held.erase(entry);
          } else {
            slots.touch(slot);
            entry->second.last_used = ++now;
          }
          break;
      }
      slots.check();
      ASSERT_EQ(slots.free_bytes(), kBudget - model.used());
      for (SlotId id = 0; id < num_slots; ++id) {
        const auto held = model.held.find(id);
        if (held == model.held.end()) {
          ASSERT_EQ(slots.state(id), State::kEmpty);
          continue;
        }
        ASSERT_EQ(slots.state(id), held->second.is_resident ? State::kResident : State::kLoading);
        ASSERT_EQ(slots.find(held->second.variant), id);
        ASSERT_EQ(slots.num_pins(id), held->second.num_pins);
        ASSERT_EQ(slots.num_bytes(id), held->second.num_bytes);
      }
    }
    EXPECT_GT(num_loads, 500);
    EXPECT_GT(num_refused, 50);
    EXPECT_GT(num_evicted, 50);
  }
}

TEST(DeltaSlots, MisuseIsAnError) {
  EXPECT_THROW(DeltaSlots(-1, 0), InvalidArgument);
  EXPECT_THROW(DeltaSlots(1, -1), InvalidArgument);
  DeltaSlots slots(1, 10);
  EXPECT_THROW(slots.state(1), InternalError);
  EXPECT_THROW(slots.begin_load(kBaseVariant, 1), InternalError);
  EXPECT_FALSE(slots.begin_load(1, 11));
  ASSERT_TRUE(slots.begin_load(1, 10));
  EXPECT_THROW(slots.begin_load(1, 10), InternalError);
  EXPECT_THROW(slots.remove(1), InternalError);  // loading
  slots.remove(2);                               // never loaded: nothing to do
  slots.check();
}

}  // namespace
}  // namespace deltazip
