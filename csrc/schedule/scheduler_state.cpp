// How one sequence or variant moves from one state to another; every index follows.

#include <algorithm>

#include "deltazip/base/error.h"
#include "schedule/scheduler_impl.h"

namespace deltazip {

Sequence& Scheduler::Impl::find(SequenceId id) const {
  const auto found = sequences.find(id);
  if (found == sequences.end()) detail::fail<NotFound>("no sequence ", id);
  return *found->second;
}

ScheduledVariant& Scheduler::Impl::find_variant(VariantId id) const {
  const auto found = variants.find(id);
  if (found == variants.end()) detail::fail<NotFound>("no variant ", id);
  return *found->second;
}

bool Scheduler::Impl::is_warm(const ScheduledVariant& variant) const {
  if (variant.is_base()) return true;
  return variant.slot != kNoSlot && slots.state(variant.slot) == DeltaSlots::State::kResident;
}

std::int32_t Scheduler::Impl::num_remaining(const Sequence& sequence) const {
  return static_cast<std::int32_t>(sequence.tokens.size()) - sequence.num_computed;
}

std::int32_t Scheduler::Impl::blocks_for(std::int64_t num_tokens) const {
  return static_cast<std::int32_t>((num_tokens + config.block_size - 1) / config.block_size);
}

void Scheduler::Impl::enqueue(Sequence& sequence) {
  ScheduledVariant& variant = *sequence.variant;
  if (variant.waiting.empty() && variant.num_running == 0) variant.last_progress = step;
  variant.waiting.insert(&sequence);
  ++num_waiting;
  refresh(variant);
}

void Scheduler::Impl::admit(Sequence& sequence, bool with_turn) {
  ScheduledVariant& variant = *sequence.variant;
  variant.waiting.erase(&sequence);
  --num_waiting;
  const auto num_tokens = static_cast<std::int32_t>(sequence.tokens.size());
  if (config.prefix_caching && sequence.use_prefix_cache) {
    // The last known token is always computed: its logits are wanted.
    const std::int32_t num_lookups = (num_tokens - 1) / config.block_size;
    extend_keys(sequence, num_lookups);
    for (std::int32_t i = 0; i < num_lookups; ++i) {
      const auto block = allocator.acquire(sequence.keys[static_cast<std::size_t>(i)]);
      if (!block) break;
      sequence.blocks.push_back(*block);
    }
    sequence.num_published = static_cast<std::int32_t>(sequence.blocks.size());
    sequence.num_computed = sequence.num_published * config.block_size;
    if (!sequence.was_admitted) {
      prefix_query_tokens += num_tokens;
      prefix_hit_tokens += sequence.num_computed;
    }
  }
  start_running(sequence);
  if (with_turn) start_turn(sequence);
}

void Scheduler::Impl::start_running(Sequence& sequence) {
  ScheduledVariant& variant = *sequence.variant;
  sequence.is_running = sequence.was_admitted = true;
  insert_running(sequence);
  if (++variant.num_running == 1) {
    variant.seated_since = step;
    if (!variant.is_base()) ++num_seats_taken;
  }
  if (!variant.is_base()) slots.pin(variant.slot);
  refresh(variant);
}

void Scheduler::Impl::insert_running(Sequence& sequence) {
  running.insert(std::upper_bound(running.begin(), running.end(), &sequence, OutranksFirst()),
                 &sequence);
}

void Scheduler::Impl::start_turn(Sequence& sequence) {
  std::erase(running, &sequence);
  sequence.turn = num_turns++;
  sequence.turn_tokens_left = config.max_variant_wait_steps;
  insert_running(sequence);
}

void Scheduler::Impl::end_turn(Sequence& sequence) {
  std::erase(running, &sequence);
  sequence.turn = Sequence::kNoTurn;
  insert_running(sequence);
}

void Scheduler::Impl::leave_running(Sequence& sequence) {
  ScheduledVariant& variant = *sequence.variant;
  std::erase(running, &sequence);
  sequence.is_running = false;
  sequence.turn = Sequence::kNoTurn;
  if (--variant.num_running == 0) {
    variant.is_closing = false;
    if (!variant.is_base()) --num_seats_taken;
  }
}

void Scheduler::Impl::unpin(const Sequence& sequence) {
  if (!sequence.variant->is_base()) slots.unpin(sequence.variant->slot);
}

void Scheduler::Impl::release_blocks(Sequence& sequence) {
  // Last first: a prefix is found from its start, so its end may be evicted first.
  for (auto block = sequence.blocks.rbegin(); block != sequence.blocks.rend(); ++block) {
    allocator.release(*block);
  }
}

void Scheduler::Impl::preempt(Sequence& sequence, Plan& plan) {
  leave_running(sequence);
  release_blocks(sequence);
  sequence.blocks.clear();
  unpin(sequence);
  sequence.num_computed = sequence.num_published = 0;
  plan.preempted.push_back(sequence.id);
  ++num_preemptions;
  sequence.variant->waiting.insert(&sequence);
  ++num_waiting;
  refresh(*sequence.variant);
}

void Scheduler::Impl::forget(Sequence& sequence) {
  ScheduledVariant& variant = *sequence.variant;
  const bool is_in_flight = sequence.num_in_flight > 0;
  if (sequence.is_running || sequence.is_ending) {
    if (sequence.is_running) leave_running(sequence);
    sequence.is_ending = false;
    // Earlier than the step's end: the next owner's writes are queued behind it.
    release_blocks(sequence);
    sequence.keeps_pin = is_in_flight || sequence.is_settling;
    if (!sequence.keeps_pin) unpin(sequence);
  } else {
    variant.waiting.erase(&sequence);
    --num_waiting;
  }
  const auto found = sequences.find(sequence.id);
  sequence.has_ended = true;
  if (is_in_flight) {
    ended_in_flight.push_back(std::move(found->second));
  } else if (sequence.is_settling) {
    ended_settling.push_back(std::move(found->second));
  }
  sequences.erase(found);
  refresh(variant);
}

void Scheduler::Impl::extend_keys(Sequence& sequence, std::int32_t num_blocks) {
  const auto block_size = static_cast<std::size_t>(config.block_size);
  const std::span<const std::int32_t> tokens(sequence.tokens);
  while (sequence.keys.size() < static_cast<std::size_t>(num_blocks)) {
    const Digest& previous = sequence.keys.empty() ? sequence.root : sequence.keys.back();
    sequence.keys.push_back(
        next_prefix_key(previous, tokens.subspan(sequence.keys.size() * block_size, block_size)));
  }
}

void Scheduler::Impl::publish_full_blocks(Sequence& sequence) {
  if (!config.prefix_caching || !sequence.use_prefix_cache) return;
  const std::int32_t num_full = sequence.num_computed / config.block_size;
  extend_keys(sequence, num_full);
  for (; sequence.num_published < num_full; ++sequence.num_published) {
    const auto i = static_cast<std::size_t>(sequence.num_published);
    allocator.publish(sequence.blocks[i], sequence.keys[i]);
  }
}

void Scheduler::Impl::refresh(ScheduledVariant& variant) {
  const Sequence* head = variant.head();
  const bool is_unserved = head != nullptr && variant.num_running == 0;
  const std::pair unserved_key(variant.last_progress, variant.id);
  if (is_unserved != variant.is_unserved || (is_unserved && unserved_key != variant.unserved_key)) {
    if (variant.is_unserved) unserved.erase(variant.unserved_key);
    if (is_unserved) unserved.insert(unserved_key);
    variant.is_unserved = is_unserved;
    variant.unserved_key = unserved_key;
  }

  const bool is_cold = head != nullptr && !variant.is_base() && variant.slot == kNoSlot;
  if (is_cold || variant.is_cold) {
    if (variant.is_cold) cold.erase(variant.cold_key);
    if (is_cold) {
      variant.cold_key = {head->priority, head->arrival, variant.id};
      cold.insert(variant.cold_key);
    }
    variant.is_cold = is_cold;
  }

  const bool wants_pin = head != nullptr && !variant.is_base() && is_warm(variant);
  if (wants_pin && !variant.has_demand_pin) slots.pin(variant.slot);
  if (!wants_pin && variant.has_demand_pin) slots.unpin(variant.slot);
  variant.has_demand_pin = wants_pin;
}

bool Scheduler::Impl::try_load(ScheduledVariant& variant, bool is_overdue, Plan& plan) {
  auto load = slots.begin_load(variant.id, variant.num_bytes);
  if (!load && is_overdue) {
    // Those that wait too, but not as long, must let their idle slot go.
    std::vector<ScheduledVariant*> yielding;
    for (ScheduledVariant* other : slot_variant) {
      if (other != nullptr && other->has_demand_pin && other->num_running == 0 &&
          other->unserved_key > variant.unserved_key) {
        slots.unpin(other->slot);
        yielding.push_back(other);
      }
    }
    load = slots.begin_load(variant.id, variant.num_bytes);
    for (ScheduledVariant* other : yielding) {
      if (slots.find(other->id)) {
        slots.pin(other->slot);
      } else {
        other->has_demand_pin = false;
      }
    }
  }
  if (!load) return false;
  for (const SlotId slot : load->evicted) {
    ScheduledVariant& evicted = *slot_variant[static_cast<std::size_t>(slot)];
    evicted.slot = kNoSlot;
    slot_variant[static_cast<std::size_t>(slot)] = nullptr;
    refresh(evicted);
  }
  variant.slot = load->slot;
  slot_variant[static_cast<std::size_t>(load->slot)] = &variant;
  refresh(variant);
  plan.loads.push_back({load->slot, variant.id, std::move(load->evicted)});
  return true;
}

void Scheduler::Impl::end_load(SlotId slot, bool is_loaded) {
  if (is_loaded) {
    slots.finish_load(slot);
  } else {
    slots.fail_load(slot);
  }
  ScheduledVariant*& variant = slot_variant[static_cast<std::size_t>(slot)];
  ScheduledVariant& changed = *variant;
  if (!is_loaded) {
    changed.slot = kNoSlot;
    variant = nullptr;
  }
  refresh(changed);
}

}  // namespace deltazip
