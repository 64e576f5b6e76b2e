// The phases of a plan. docs/scheduling.md tells the policy and its bounds.

#include <algorithm>

#include "deltazip/base/error.h"
#include "schedule/scheduler_impl.h"

namespace deltazip {
namespace {

// A prefill that gets any rows gets so many: fewer read a delta for little.
constexpr std::int32_t kLeastPrefillRows = 16;

}  // namespace

// A variant that made no progress for max_variant_wait_steps is overdue. The longest overdue is
// served first: seats, slots, places and blocks are kept for it, and taken for it in the end.
void Scheduler::Impl::serve_overdue(Plan& plan) {
  const auto patience = static_cast<std::uint64_t>(config.max_variant_wait_steps);
  give_turns_to_stalled();

  // No more than can be served at once, so that a step costs the same however many wait.
  std::vector<ScheduledVariant*> overdue;
  const std::size_t max_served = slot_variant.size() + 1;
  for (const auto& [since, id] : unserved) {
    if (since + patience > step || overdue.size() == max_served) break;
    overdue.push_back(&find_variant(id));
  }
  close_seats(overdue, plan);

  hold_places = hold_slots = false;
  num_open_seats = config.max_variants_per_batch - num_seats_taken;
  for (ScheduledVariant* variant : overdue) {
    if (!variant->is_base()) {
      // Behind one that waits for a slot nobody takes an idle slot: it may be the one it needs.
      if (hold_slots) continue;
      const bool has_seat = num_open_seats > 0;
      if (has_seat) --num_open_seats;
      if (variant->slot == kNoSlot) hold_slots = !try_load(*variant, /*is_overdue=*/true, plan);
      if (!has_seat || !is_warm(*variant)) continue;
    }
    if (!try_admit_overdue(*variant->head(), plan)) hold_places = true;
  }
  if (hold_slots) num_open_seats = 0;
}

// Closes as many seats as the overdue need: they admit no more, and are emptied if they still run
// after max_variant_wait_steps.
void Scheduler::Impl::close_seats(std::span<ScheduledVariant* const> overdue, Plan& plan) {
  const auto patience = static_cast<std::uint64_t>(config.max_variant_wait_steps);
  // What is free for the overdue, or will be: negative once all seats are closed.
  std::int32_t num_seats_left = config.max_variants_per_batch - num_seats_taken;
  std::int32_t num_slots_left = 0;
  std::int64_t num_bytes_left = slots.free_bytes();
  for (SlotId slot = 0; slot < slots.num_slots(); ++slot) {
    const ScheduledVariant* variant = slot_variant[static_cast<std::size_t>(slot)];
    if (variant != nullptr && (variant->num_running > 0 || !is_warm(*variant))) continue;
    ++num_slots_left;
    num_bytes_left += slots.num_bytes(slot);
  }
  const std::vector<ScheduledVariant*> seats = closable_seats();
  std::size_t num_closed = 0;
  for (const ScheduledVariant* variant : overdue) {
    if (variant->is_base()) continue;
    const bool is_loading = variant->slot != kNoSlot && !is_warm(*variant);
    const std::int32_t num_slots_needed = is_loading ? 0 : 1;
    const std::int64_t num_bytes_needed = is_loading ? 0 : variant->num_bytes;
    while (num_closed < seats.size() && (num_seats_left < 1 || num_slots_left < num_slots_needed ||
                                         num_bytes_left < num_bytes_needed)) {
      ++num_seats_left;
      ++num_slots_left;
      num_bytes_left += seats[num_closed++]->num_bytes;
    }
    --num_seats_left;
    num_slots_left -= num_slots_needed;
    num_bytes_left -= num_bytes_needed;
  }
  for (std::size_t i = 0; i < seats.size(); ++i) {
    ScheduledVariant& seat = *seats[i];
    if (i < num_closed && !seat.is_closing) seat.closing_since = step;
    seat.is_closing = i < num_closed;
    if (!seat.is_closing || step < seat.closing_since + patience) continue;
    const std::vector<Sequence*> candidates = running;
    for (Sequence* sequence : candidates) {
      if (sequence->variant == &seat) preempt(*sequence, plan);
    }
  }
}

// A variant may also run and yet get no token for long, for want of blocks or of a share of the
// batch: then its first sequence takes a turn.
void Scheduler::Impl::give_turns_to_stalled() {
  const auto patience = static_cast<std::uint64_t>(config.max_variant_wait_steps);
  const auto consider = [&](const ScheduledVariant* variant) {
    if (variant == nullptr || variant->num_running == 0) return;
    if (variant->last_progress + patience > step) return;
    Sequence* first = *std::find_if(running.begin(), running.end(),
                                    [&](const Sequence* s) { return s->variant == variant; });
    if (!first->has_turn()) start_turn(*first);
  };
  consider(variants.at(kBaseVariant).get());
  for (const ScheduledVariant* variant : slot_variant) consider(variant);
}

// Deltas with running sequences none of which has a turn: first those that drain already, then
// those that have had their seat the longest.
std::vector<ScheduledVariant*> Scheduler::Impl::closable_seats() {
  std::vector<ScheduledVariant*> seats;
  for (ScheduledVariant* variant : slot_variant) {
    if (variant == nullptr) continue;
    const bool has_turn = std::any_of(running.begin(), running.end(), [&](const Sequence* s) {
      return s->variant == variant && s->has_turn();
    });
    if (has_turn || variant->num_running == 0) {
      variant->is_closing = false;
    } else {
      seats.push_back(variant);
    }
  }
  const auto order = [](const ScheduledVariant* variant) {
    return std::tuple(!variant->is_closing, variant->is_closing ? variant->closing_since : 0,
                      variant->seated_since, variant->id);
  };
  std::sort(seats.begin(), seats.end(),
            [&](const auto* a, const auto* b) { return order(a) < order(b); });
  return seats;
}

// False: it must wait, and what becomes free is kept for it.
bool Scheduler::Impl::try_admit_overdue(Sequence& sequence, Plan& plan) {
  const auto patience = static_cast<std::uint64_t>(config.max_variant_wait_steps);
  const bool may_take = sequence.variant->last_progress + 2 * patience <= step;
  const bool has_place = static_cast<std::int32_t>(running.size()) < max_running;
  const bool has_blocks = fits_now(sequence);
  if (!has_place || !has_blocks) {
    if (!may_take || !fits_beside(sequence, /*only_turns=*/true)) return false;
    if (!has_place) {
      if (running.back()->has_turn()) return false;
      preempt(*running.back(), plan);
    }
  }
  admit(sequence, /*with_turn=*/true);
  return true;
}

// A waiting sequence of strictly higher priority takes the place and blocks of the lowest.
void Scheduler::Impl::displace_by_priority(Plan& plan) {
  while (!hold_places && !running.empty() && !running.back()->has_turn()) {
    Sequence* sequence = best_candidate();
    if (sequence == nullptr || sequence->priority >= running.back()->priority) return;
    const bool has_place = static_cast<std::int32_t>(running.size()) < max_running;
    if (has_place && fits_now(*sequence)) return;  // it will be admitted beside the others
    if (!fits_beside(*sequence, /*only_turns=*/false)) return;
    if (!has_place) preempt(*running.back(), plan);
    admit(*sequence, /*with_turn=*/false);
    if (!sequence->variant->is_base() && sequence->variant->num_running == 1) --num_open_seats;
  }
}

// Decodes have their row before any prefill takes more than one. Blocks go by rank: the first can
// always have all others preempted, so it always advances.
void Scheduler::Impl::schedule_running(Plan& plan) {
  const auto decodes = [this](const Sequence* sequence) { return num_remaining(*sequence) == 1; };
  const bool is_limited = prefill_chunk_tokens > 0 && std::ranges::any_of(running, decodes);
  prefill_rows_left = is_limited ? prefill_chunk_tokens : kNoLimit;
  for (std::size_t i = 0; i < running.size(); ++i) {
    const std::int32_t num_places = max_running - static_cast<std::int32_t>(plan.chunks.size());
    if (num_places <= 0) break;
    Sequence& sequence = *running[i];
    if (!take_blocks(sequence, plan)) continue;
    std::int32_t num_tokens = num_remaining(sequence);
    if (num_tokens > 1) {
      const auto num_decodes = static_cast<std::int32_t>(std::count_if(
          running.begin() + static_cast<std::ptrdiff_t>(i) + 1, running.end(), decodes));
      num_tokens = std::min(
          {num_tokens, prefill_share(),
           config.max_batch_tokens - plan.num_tokens - std::min(num_decodes, num_places - 1)});
      if (sequence.scores_prompt) {
        // A logit row stays for each that may follow.
        const auto num_after = static_cast<std::int32_t>(running.size() - i - 1);
        num_tokens = std::min(
            num_tokens, max_logit_rows - plan.num_logit_rows - std::min(num_after, num_places - 1));
      }
    }
    if (num_tokens > 0) schedule(sequence, num_tokens, plan);
  }
}

void Scheduler::Impl::admit_waiting(Plan& plan) {
  // After a preemption blocks are scarce: who just lost them would come back to lose them again.
  const bool has_something = !plan.chunks.empty() || num_advanced > 0;
  if (has_something && (hold_places || !plan.preempted.empty())) return;
  while (static_cast<std::int32_t>(running.size()) < max_running &&
         static_cast<std::int32_t>(plan.chunks.size()) < max_running &&
         plan.num_tokens < config.max_batch_tokens && plan.num_logit_rows < max_logit_rows &&
         prefill_rows_left > 0) {
    Sequence* sequence = best_candidate();
    if (sequence == nullptr || !fits_now(*sequence)) return;
    admit(*sequence, /*with_turn=*/false);
    if (!sequence->variant->is_base() && sequence->variant->num_running == 1) --num_open_seats;
    DZ_INTERNAL(take_blocks(*sequence, plan), "sequence ", sequence->id, " was said to fit");
    std::int32_t num_tokens = std::min(
        {num_remaining(*sequence), prefill_share(), config.max_batch_tokens - plan.num_tokens});
    if (sequence->scores_prompt) {
      num_tokens = std::min(num_tokens, max_logit_rows - plan.num_logit_rows);
    }
    schedule(*sequence, num_tokens, plan);
  }
}

// What no other prefill took of a limit goes to those that lack rows, in the order of their chunks.
void Scheduler::Impl::extend_prefills(Plan& plan) {
  if (prefill_rows_left == kNoLimit) return;
  for (std::size_t i = 0; i < plan.chunks.size(); ++i) {
    Sequence& sequence = *in_flight[i];
    std::int32_t num_tokens =
        std::min({num_remaining(sequence) - sequence.num_in_flight, prefill_rows_left,
                  config.max_batch_tokens - plan.num_tokens});
    if (sequence.scores_prompt) {
      num_tokens = std::min(num_tokens, max_logit_rows - plan.num_logit_rows);
    }
    if (num_tokens > 0) extend(sequence, plan.chunks[i], num_tokens, plan);
  }
}

void Scheduler::Impl::order_loads(Plan& plan) {
  while (!hold_slots && !cold.empty()) {
    if (!try_load(find_variant(std::get<2>(*cold.begin())), false, plan)) return;
  }
}

void Scheduler::Impl::finish_plan(Plan& plan) {
  if (plan.chunks.empty()) {
    // Blocks may be held by what ends with the plan that was advanced.
    DZ_INTERNAL(plan.copies.empty() && (running.empty() || num_advanced > 0), "an empty plan with ",
                running.size(), " running sequences");
    return;
  }
  std::stable_sort(plan.chunks.begin(), plan.chunks.end(), [](const auto& a, const auto& b) {
    return std::pair(a.slot, a.num_tokens > 1) < std::pair(b.slot, b.num_tokens > 1);
  });
  SlotId touched = kNoSlot;
  for (const ScheduledChunk& chunk : plan.chunks) {
    if (chunk.slot == touched) continue;
    touched = chunk.slot;
    slots.touch(touched);
  }
  num_planned = plan.chunks.size();
  ++step;
}

// The best-ranked head of the warm variants that may admit.
Sequence* Scheduler::Impl::best_candidate() const {
  Sequence* best = variants.at(kBaseVariant)->head();
  for (const ScheduledVariant* variant : slot_variant) {
    if (variant == nullptr || variant->is_closing || !is_warm(*variant)) continue;
    if (variant->num_running == 0 && num_open_seats <= 0) continue;
    Sequence* head = variant->head();
    if (head == nullptr || (best != nullptr && best->rank() < head->rank())) continue;
    best = head;
  }
  return best;
}

// Whether all its known tokens find room without a preemption, and each running sequence one more
// block: else what is admitted now would be preempted in the next steps.
bool Scheduler::Impl::fits_now(Sequence& sequence) {
  const auto num_tokens = static_cast<std::int32_t>(sequence.tokens.size());
  const std::int32_t num_needed =
      blocks_for(num_tokens) + static_cast<std::int32_t>(running.size());
  if (num_needed <= allocator.num_free()) return true;
  if (!config.prefix_caching || !sequence.use_prefix_cache) return false;
  const std::int32_t num_lookups = (num_tokens - 1) / config.block_size;
  extend_keys(sequence, num_lookups);
  std::int32_t num_shared = 0;  // blocks that are in use already cost nothing
  for (std::int32_t i = 0; i < num_lookups; ++i) {
    const auto block = allocator.acquire(sequence.keys[static_cast<std::size_t>(i)]);
    if (!block) break;
    if (allocator.num_owners(*block) > 1) ++num_shared;
    allocator.release(*block);
  }
  return num_needed - num_shared <= allocator.num_free();
}

// Whether it would find room if all running sequences that may be preempted for it were.
bool Scheduler::Impl::fits_beside(const Sequence& sequence, bool only_turns) const {
  std::int32_t num_held = 0;
  for (const Sequence* other : running) {
    const bool stays = only_turns ? other->has_turn() : other->rank() < sequence.rank();
    if (stays) num_held += static_cast<std::int32_t>(other->blocks.size());
  }
  return blocks_for(static_cast<std::int64_t>(sequence.tokens.size())) <=
         config.num_blocks - num_held;
}

BlockId Scheduler::Impl::take_free_block() {
  const std::optional<BlockId> block = allocator.allocate();
  DZ_INTERNAL(block.has_value(), "no block is free where one was counted");
  return *block;
}

// Blocks for all known tokens, and a block of its own to write into. All or nothing; preempts only
// what ranks below, which this plan has not scheduled yet. False: it stalls in this step.
bool Scheduler::Impl::take_blocks(Sequence& sequence, Plan& plan) {
  const auto write_block = static_cast<std::size_t>(sequence.num_computed / config.block_size);
  const std::int32_t num_missing = blocks_for(static_cast<std::int64_t>(sequence.tokens.size())) -
                                   static_cast<std::int32_t>(sequence.blocks.size());
  bool must_copy = false;
  while (true) {
    must_copy = write_block < sequence.blocks.size() &&
                allocator.num_owners(sequence.blocks[write_block]) > 1;
    if (num_missing + (must_copy ? 1 : 0) <= allocator.num_free()) break;
    if (running.back() == &sequence) return false;
    preempt(*running.back(), plan);
  }
  if (must_copy) {
    const BlockId from = sequence.blocks[write_block];
    sequence.blocks[write_block] = take_free_block();
    plan.copies.push_back({from, sequence.blocks[write_block]});
    allocator.release(from);
  }
  for (std::int32_t i = 0; i < num_missing; ++i) sequence.blocks.push_back(take_free_block());
  return true;
}

// Half of what is left of a limit: who comes later, or ranks lower, finds some as well.
std::int32_t Scheduler::Impl::prefill_share() const {
  if (prefill_rows_left == kNoLimit) return kNoLimit;
  const std::int32_t half = prefill_rows_left / 2 + prefill_rows_left % 2;
  return std::min(prefill_rows_left, std::max(half, kLeastPrefillRows));
}

void Scheduler::Impl::schedule(Sequence& sequence, std::int32_t num_tokens, Plan& plan) {
  in_flight.push_back(&sequence);
  if (!sequence.scores_prompt) ++plan.num_logit_rows;
  ScheduledChunk& chunk = plan.chunks.emplace_back();
  chunk.id = sequence.id;
  chunk.variant = sequence.variant->id;
  chunk.slot = sequence.variant->slot;
  chunk.start = sequence.num_computed;
  chunk.blocks = sequence.blocks;
  extend(sequence, chunk, num_tokens, plan);
}

void Scheduler::Impl::extend(Sequence& sequence, ScheduledChunk& chunk, std::int32_t num_tokens,
                             Plan& plan) {
  const bool is_prefill = num_remaining(sequence) > 1;
  if (is_prefill && prefill_rows_left != kNoLimit) prefill_rows_left -= num_tokens;
  sequence.num_in_flight += num_tokens;
  sequence.samples_in_flight = sequence.num_in_flight == num_remaining(sequence);
  chunk.num_tokens = sequence.num_in_flight;
  chunk.samples = sequence.samples_in_flight;
  chunk.tokens = std::span(sequence.tokens)
                     .subspan(static_cast<std::size_t>(chunk.start),
                              static_cast<std::size_t>(chunk.num_tokens));
  plan.num_tokens += num_tokens;
  if (sequence.scores_prompt) plan.num_logit_rows += num_tokens;
}

}  // namespace deltazip
