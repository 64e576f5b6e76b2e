// Proves the ledgers against each other.

#include <algorithm>

#include "deltazip/base/error.h"
#include "schedule/scheduler_impl.h"

namespace deltazip {

void Scheduler::Impl::check() const {
  allocator.check();
  slots.check();
  DZ_INTERNAL(std::is_sorted(running.begin(), running.end(), OutranksFirst()),
              "the running sequences are not in order of rank");

  std::vector<std::int32_t> num_owners(static_cast<std::size_t>(config.num_blocks), 0);
  std::unordered_map<const ScheduledVariant*, std::int32_t> num_running, num_waiting_of, num_pins;
  std::int32_t num_waiting_found = 0;
  std::size_t num_running_found = 0;
  for (const auto& [id, owned] : sequences) {
    const Sequence& sequence = *owned;
    DZ_INTERNAL(sequence.id == id && !sequence.has_ended, "sequence ", id, " is listed wrongly");
    const auto num_tokens = static_cast<std::int32_t>(sequence.tokens.size());
    DZ_INTERNAL(sequence.has_unknown == (sequence.tokens.back() == kUnknownToken) &&
                    (!sequence.has_unknown || sequence.is_settling),
                "sequence ", id, " has a last token that is wrongly unknown");
    for (const BlockId block : sequence.blocks) ++num_owners[static_cast<std::size_t>(block)];
    if (sequence.is_ending) {
      ++num_pins[sequence.variant];
      DZ_INTERNAL(!sequence.is_running && sequence.has_unknown && sequence.num_in_flight == 0,
                  "sequence ", id, " both ends and goes on");
      continue;
    }
    if (!sequence.is_running) {
      ++num_waiting_found;
      ++num_waiting_of[sequence.variant];
      DZ_INTERNAL(sequence.blocks.empty() && sequence.num_computed == 0, "waiting sequence ", id,
                  " holds ", sequence.blocks.size(), " blocks");
      DZ_INTERNAL(sequence.num_in_flight == 0 && !sequence.has_turn(), "waiting sequence ", id,
                  " is in flight or has a turn");
      DZ_INTERNAL(sequence.variant->waiting.contains(owned.get()), "waiting sequence ", id,
                  " is not in its variant's queue");
      continue;
    }
    ++num_running_found;
    ++num_running[sequence.variant];
    ++num_pins[sequence.variant];
    DZ_INTERNAL(std::find(running.begin(), running.end(), &sequence) != running.end(),
                "running sequence ", id, " is not listed");
    DZ_INTERNAL(sequence.num_computed + sequence.num_in_flight <= num_tokens &&
                    sequence.num_computed < num_tokens,
                "sequence ", id, ": ", sequence.num_computed, " of ", num_tokens,
                " tokens are computed, ", sequence.num_in_flight, " are in flight");
    const auto num_blocks = static_cast<std::int32_t>(sequence.blocks.size());
    DZ_INTERNAL(num_blocks >= blocks_for(sequence.num_computed + sequence.num_in_flight) &&
                    num_blocks <= blocks_for(num_tokens),
                "sequence ", id, " has ", num_blocks, " blocks for ", num_tokens, " tokens");
    DZ_INTERNAL(sequence.num_published * config.block_size <= sequence.num_computed, "sequence ",
                id, " published ", sequence.num_published, " blocks of ", sequence.num_computed,
                " tokens");
  }
  DZ_INTERNAL(num_running_found == running.size(), running.size(),
              " sequences are listed running, ", num_running_found, " are");
  DZ_INTERNAL(num_waiting_found == num_waiting, num_waiting, " sequences are counted waiting, ",
              num_waiting_found, " are");
  for (BlockId block = 0; block < config.num_blocks; ++block) {
    const std::int32_t expected = num_owners[static_cast<std::size_t>(block)];
    DZ_INTERNAL(allocator.num_owners(block) == expected, "block ", block, " has ",
                allocator.num_owners(block), " owners in the ledger, ", expected, " sequences");
  }
  for (const auto* list : {&ended_in_flight, &ended_settling}) {
    for (const auto& ended : *list) num_pins[ended->variant] += ended->keeps_pin ? 1 : 0;
  }

  std::int32_t num_seats = 0;
  std::size_t num_unserved = 0, num_cold = 0;
  for (const auto& [id, owned] : variants) {
    const ScheduledVariant& variant = *owned;
    const auto count = [&](const auto& counts) {
      const auto found = counts.find(&variant);
      return found == counts.end() ? 0 : found->second;
    };
    DZ_INTERNAL(variant.id == id && variant.num_running == count(num_running) &&
                    static_cast<std::int32_t>(variant.waiting.size()) == count(num_waiting_of),
                "variant ", id, " counts ", variant.num_running, " running and ",
                variant.waiting.size(), " waiting");
    const bool is_unserved = !variant.waiting.empty() && variant.num_running == 0;
    DZ_INTERNAL(variant.is_unserved == is_unserved &&
                    (!is_unserved ||
                     (variant.unserved_key == std::pair(variant.last_progress, variant.id) &&
                      unserved.contains(variant.unserved_key))),
                "variant ", id, " is not where the unserved are");
    if (is_unserved) ++num_unserved;
    if (variant.is_base()) continue;
    if (variant.num_running > 0) ++num_seats;
    const bool is_cold = !variant.waiting.empty() && variant.slot == kNoSlot;
    DZ_INTERNAL(variant.is_cold == is_cold && (!is_cold || cold.contains(variant.cold_key)),
                "variant ", id, " is not where the cold are");
    if (is_cold) ++num_cold;
    const std::optional<SlotId> slot = slots.find(id);
    DZ_INTERNAL(slot.value_or(kNoSlot) == variant.slot, "variant ", id, " is thought in slot ",
                variant.slot);
    if (!slot) continue;
    DZ_INTERNAL(slot_variant[static_cast<std::size_t>(*slot)] == &variant, "slot ", *slot,
                " is not known to be of variant ", id);
    const std::int32_t pins = count(num_pins) + (variant.has_demand_pin ? 1 : 0);
    DZ_INTERNAL(slots.num_pins(*slot) == pins, "slot ", *slot, " has ", slots.num_pins(*slot),
                " pins, not ", pins);
  }
  DZ_INTERNAL(num_unserved == unserved.size() && num_cold == cold.size(), "the indices list ",
              unserved.size(), " unserved and ", cold.size(), " cold variants");
  DZ_INTERNAL(num_seats == num_seats_taken && num_seats <= config.max_variants_per_batch, num_seats,
              " deltas have running sequences, the ledger says ", num_seats_taken);
}

}  // namespace deltazip
