#include "deltazip/schedule/scheduler.h"

#include <algorithm>
#include <utility>

#include "deltazip/base/error.h"
#include "schedule/scheduler_impl.h"

namespace deltazip {

bool Plan::reads(SlotId slot) const {
  return std::ranges::any_of(chunks, [slot](const auto& chunk) { return chunk.slot == slot; });
}

Scheduler::Impl::Impl(const SchedulerConfig& given)
    : config(given),
      max_running(std::min(given.max_batch_sequences, given.max_batch_tokens)),
      max_logit_rows(given.max_batch_logit_rows == 0 ? given.max_batch_tokens
                                                     : given.max_batch_logit_rows),
      allocator(given.num_blocks),
      slots(given.num_delta_slots, given.delta_budget_bytes),
      slot_variant(static_cast<std::size_t>(given.num_delta_slots), nullptr) {
  const auto at_least_one = [](std::int32_t value, const char* name) {
    DZ_CHECK(value >= 1, "scheduler: ", name, " must be at least 1, got ", value);
  };
  at_least_one(config.block_size, "block_size");
  at_least_one(config.max_batch_tokens, "max_batch_tokens");
  at_least_one(config.max_batch_sequences, "max_batch_sequences");
  at_least_one(config.max_variants_per_batch, "max_variants_per_batch");
  at_least_one(config.max_waiting, "max_waiting");
  at_least_one(config.max_model_len, "max_model_len");
  at_least_one(config.max_variant_wait_steps, "max_variant_wait_steps");
  DZ_CHECK(max_logit_rows >= max_running, "scheduler: max_batch_logit_rows must be at least ",
           max_running, ", one for each sequence of a step, got ", max_logit_rows);
  variants.emplace(kBaseVariant, std::make_unique<ScheduledVariant>());
}

Scheduler::Scheduler(const SchedulerConfig& config) : impl_(std::make_unique<Impl>(config)) {
  set_prefill_chunk_tokens(config.prefill_chunk_tokens);
}
Scheduler::~Scheduler() = default;

void Scheduler::add_variant(VariantId id, std::int64_t num_bytes) {
  if (id == kBaseVariant) {
    DZ_CHECK(num_bytes == 0, "the base takes no slot, got ", num_bytes, " bytes");
    return;
  }
  DZ_CHECK(!impl_->variants.contains(id), "variant ", id, " is already known");
  DZ_CHECK(num_bytes >= 0, "variant ", id, ": a delta of ", num_bytes, " bytes");
  DZ_CHECK(impl_->config.num_delta_slots > 0, "variant ", id, ": there are no delta slots");
  DZ_CHECK(num_bytes <= impl_->config.delta_budget_bytes, "variant ", id, ": its delta takes ",
           num_bytes, " bytes, the budget of all slots is ", impl_->config.delta_budget_bytes);
  auto variant = std::make_unique<ScheduledVariant>();
  variant->id = id;
  variant->num_bytes = num_bytes;
  impl_->variants.emplace(id, std::move(variant));
}

bool Scheduler::try_remove_variant(VariantId id) {
  DZ_CHECK(id != kBaseVariant, "the base cannot be removed");
  const auto found = impl_->variants.find(id);
  if (found == impl_->variants.end()) return true;
  ScheduledVariant& variant = *found->second;
  variant.is_removing = true;
  if (variant.num_running > 0 || !variant.waiting.empty()) return false;
  if (variant.slot != kNoSlot) {
    if (!impl_->is_warm(variant) || impl_->slots.num_pins(variant.slot) > 0) return false;
    impl_->slots.remove(id);
    impl_->slot_variant[static_cast<std::size_t>(variant.slot)] = nullptr;
  }
  impl_->variants.erase(found);
  return true;
}

std::optional<SlotId> Scheduler::slot_of(VariantId variant) const {
  return impl_->slots.find(variant);
}

void Scheduler::add(SequenceSpec spec) {
  Impl& impl = *impl_;
  DZ_CHECK(!impl.sequences.contains(spec.id), "sequence ", spec.id, " is already known");
  ScheduledVariant& variant = impl.find_variant(spec.variant);
  if (variant.is_removing) {
    detail::fail<NotFound>("variant ", spec.variant, " is being removed and takes no new sequence");
  }
  DZ_CHECK(!spec.prompt.empty(), "sequence ", spec.id, ": the prompt is empty");
  DZ_CHECK(spec.max_new_tokens >= 0, "sequence ", spec.id,
           ": max_new_tokens must not be negative, got ", spec.max_new_tokens);
  const auto num_prompt = static_cast<std::int64_t>(spec.prompt.size());
  const std::int64_t num_total = num_prompt + spec.max_new_tokens;
  DZ_CHECK(num_total <= impl.config.max_model_len, "sequence ", spec.id, ": ", num_prompt,
           " prompt tokens and up to ", spec.max_new_tokens, " new ones are ", num_total,
           ", the limit is ", impl.config.max_model_len);
  // The last token is sampled but never computed.
  const std::int32_t num_blocks = impl.blocks_for(std::max(num_prompt, num_total - 1));
  DZ_CHECK(num_blocks <= impl.config.num_blocks, "sequence ", spec.id, ": ", num_prompt,
           " prompt tokens and up to ", spec.max_new_tokens, " new ones need ", num_blocks,
           " blocks of ", impl.config.block_size, " tokens, the KV cache has ",
           impl.config.num_blocks);
  if (impl.num_waiting >= impl.config.max_waiting) {
    detail::fail<ResourceExhausted>("the queue is full: ", impl.num_waiting,
                                    " sequences wait, the limit is ", impl.config.max_waiting);
  }
  auto sequence = std::make_unique<Sequence>();
  sequence->id = spec.id;
  sequence->variant = &variant;
  sequence->tokens = std::move(spec.prompt);
  sequence->num_prompt_tokens = static_cast<std::int32_t>(num_prompt);
  sequence->max_new_tokens = spec.max_new_tokens;
  sequence->priority = spec.priority;
  sequence->arrival = impl.num_arrivals++;
  sequence->use_prefix_cache = spec.use_prefix_cache;
  sequence->scores_prompt = spec.scores_prompt;
  sequence->root = spec.prefix_root;
  Sequence& added = *sequence;
  impl.sequences.emplace(spec.id, std::move(sequence));
  impl.enqueue(added);
}

void Scheduler::fork(SequenceId parent_id, SequenceId child_id) {
  Impl& impl = *impl_;
  const Sequence& parent = impl.find(parent_id);
  DZ_CHECK(!impl.sequences.contains(child_id), "sequence ", child_id, " is already known");
  DZ_CHECK(!parent.has_unknown, "sequence ", parent_id,
           " cannot be forked before its last token is known");
  const auto num_known = static_cast<std::int32_t>(parent.tokens.size());
  const bool joins_plan = parent.num_in_flight > 0 && parent.samples_in_flight;
  DZ_CHECK(joins_plan || num_known > parent.num_prompt_tokens, "sequence ", parent_id,
           " cannot be forked before its prompt of ", parent.num_prompt_tokens,
           " tokens is computed (", parent.num_computed, " are)");

  auto copy = std::make_unique<Sequence>();
  Sequence& child = *copy;
  child.id = child_id;
  child.variant = parent.variant;
  child.tokens = parent.tokens;
  child.num_prompt_tokens = parent.num_prompt_tokens;
  child.max_new_tokens = parent.max_new_tokens;
  child.priority = parent.priority;
  child.arrival = impl.num_arrivals++;
  child.use_prefix_cache = parent.use_prefix_cache;
  child.root = parent.root;
  child.keys = parent.keys;
  child.was_admitted = true;
  impl.sequences.emplace(child_id, std::move(copy));
  if (!parent.is_running) {  // preempted: nothing to share, the child is recomputed like it
    impl.enqueue(child);
    return;
  }
  child.num_computed = parent.num_computed;
  child.num_published = parent.num_published;
  if (joins_plan) {
    child.num_in_flight = parent.num_in_flight;
    child.samples_in_flight = true;
    impl.in_flight.push_back(&child);
  }
  const std::int32_t num_shared = impl.blocks_for(child.num_computed + child.num_in_flight);
  child.blocks.assign(parent.blocks.begin(), parent.blocks.begin() + num_shared);
  for (const BlockId block : child.blocks) impl.allocator.share(block);
  impl.start_running(child);
}

void Scheduler::cancel(SequenceId id) {
  const auto found = impl_->sequences.find(id);
  if (found != impl_->sequences.end()) impl_->forget(*found->second);
}

bool Scheduler::has(SequenceId id) const { return impl_->sequences.contains(id); }
bool Scheduler::has_work() const { return !impl_->sequences.empty(); }

void Scheduler::set_prefill_chunk_tokens(std::int32_t num_tokens) {
  DZ_CHECK(num_tokens >= 0,
           "scheduler: prefill_chunk_tokens must be at least 1, or 0 for no limit, "
           "got ",
           num_tokens);
  impl_->prefill_chunk_tokens = num_tokens;
}

void Scheduler::delta_loaded(SlotId slot) { impl_->end_load(slot, true); }

std::vector<SequenceId> Scheduler::delta_load_failed(SlotId slot) {
  DZ_INTERNAL(impl_->slots.state(slot) == DeltaSlots::State::kLoading, "delta slot ", slot,
              " is not loading");
  ScheduledVariant& variant = *impl_->slot_variant[static_cast<std::size_t>(slot)];
  impl_->end_load(slot, false);
  std::vector<SequenceId> dropped;
  while (Sequence* head = variant.head()) {
    dropped.push_back(head->id);
    impl_->forget(*head);
  }
  return dropped;
}

Plan Scheduler::plan() {
  Impl& impl = *impl_;
  DZ_INTERNAL(impl.in_flight.empty(), "the last plan is not committed");
  Plan plan;
  impl.serve_overdue(plan);
  impl.displace_by_priority(plan);
  impl.schedule_running(plan);
  impl.admit_waiting(plan);
  impl.extend_prefills(plan);
  impl.order_loads(plan);
  impl.finish_plan(plan);
  return plan;
}

std::span<const std::int32_t> Scheduler::tokens(SequenceId id) const {
  return impl_->find(id).tokens;
}

SchedulerStats Scheduler::stats() const {
  SchedulerStats stats;
  stats.num_waiting = impl_->num_waiting;
  stats.num_running = static_cast<std::int32_t>(impl_->running.size());
  stats.num_blocks = impl_->allocator.num_blocks();
  stats.num_free_blocks = impl_->allocator.num_free();
  stats.num_preemptions = impl_->num_preemptions;
  stats.prefix_hit_tokens = impl_->prefix_hit_tokens;
  stats.prefix_query_tokens = impl_->prefix_query_tokens;
  return stats;
}

void Scheduler::check() const { impl_->check(); }

}  // namespace deltazip
