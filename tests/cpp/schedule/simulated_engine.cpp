#include "schedule/simulated_engine.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include "deltazip/base/error.h"
#include "deltazip/schedule/block_allocator.h"

namespace deltazip {
namespace {

constexpr std::int32_t kVocabulary = 3;  // small, so that outputs often agree and share blocks

template <typename... Parts>
void demand(bool condition, const Parts&... parts) {
  if (!condition) throw std::logic_error(detail::concat(parts...));
}

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  std::uint64_t value = a ^ (b + 0x9E3779B97F4A7C15ull + (a << 6) + (a >> 2));
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
  return value ^ (value >> 31);
}

Digest root_of(VariantId variant, std::uint32_t salt) {
  const std::array<VariantId, 1> content{variant};
  const std::array<std::uint32_t, 1> salts{salt};
  return prefix_root(sha256(std::as_bytes(std::span(content))), std::as_bytes(std::span(salts)));
}

}  // namespace

SimulatedEngine::SimulatedEngine(const SchedulerConfig& config, std::uint32_t seed)
    : config_(config), scheduler_(config), rng_(seed) {
  kv_.resize(static_cast<std::size_t>(config.num_blocks * config.block_size), 0);
  variants_[kBaseVariant] = 0;
}

// The number that position num_tokens - 1 holds.
std::uint64_t SimulatedEngine::chain(const Sequence& sequence, std::size_t num_tokens) const {
  std::uint64_t value =
      mix(static_cast<std::uint64_t>(sequence.request.variant) + 1, sequence.request.salt);
  for (std::size_t i = 0; i < num_tokens; ++i) {
    value = mix(value, static_cast<std::uint64_t>(sequence.tokens[i]));
  }
  return value;
}

void SimulatedEngine::add_variant(VariantId variant, std::int64_t num_bytes) {
  scheduler_.add_variant(variant, num_bytes);
  variants_[variant] = num_bytes;
  check();
}

bool SimulatedEngine::try_remove_variant(VariantId variant) {
  const auto slot = scheduler_.slot_of(variant);
  const bool is_used = std::any_of(sequences_.begin(), sequences_.end(), [&](const auto& entry) {
    return entry.second.request.variant == variant;
  });
  const bool is_gone = scheduler_.try_remove_variant(variant);
  demand(!(is_gone && is_used), "variant ", variant, " went while it was used");
  if (is_gone) {
    demand(!slot || !loading_.contains(*slot), "variant ", variant, " went while loading");
    for (const ScheduledChunk& chunk : plan_.chunks) {
      demand(!is_under_way_ || chunk.variant != variant, "variant ", variant, " went in a plan");
    }
    if (slot) resident_.erase(*slot);
    variants_.erase(variant);
    last_progress_.erase(variant);
  }
  check();
  return is_gone;
}

void SimulatedEngine::submit(const Request& request) {
  SequenceSpec spec;
  spec.id = request.id;
  spec.variant = request.variant;
  spec.prompt = request.prompt;
  spec.max_new_tokens = request.max_new > 0 ? request.max_new : request.num_new;
  spec.priority = request.priority;
  spec.prefix_root = root_of(request.variant, request.salt);
  spec.use_prefix_cache = request.use_prefix_cache;
  spec.scores_prompt = request.scores_prompt;
  scheduler_.add(std::move(spec));
  sequences_[request.id] = {request, request.prompt, -1};
  check();
}

void SimulatedEngine::cancel(SequenceId id) {
  scheduler_.cancel(id);
  demand(!scheduler_.has(id), "sequence ", id, " is there after its cancel");
  if (sequences_.erase(id) > 0) cancelled_.insert(id);
  joined_.erase(id);
  check();
}

void SimulatedEngine::set_prefill_chunk_tokens(std::int32_t num_tokens) {
  config_.prefill_chunk_tokens = num_tokens;
  scheduler_.set_prefill_chunk_tokens(num_tokens);
}

bool SimulatedEngine::can_fork(SequenceId parent) const {
  const Sequence& sequence = sequences_.at(parent);
  if (sequence.tokens.size() > sequence.request.prompt.size()) return true;
  if (!is_under_way_) return false;
  return joined_.contains(parent) ||
         std::any_of(plan_.chunks.begin(), plan_.chunks.end(), [&](const ScheduledChunk& chunk) {
           return chunk.id == parent && chunk.samples;
         });
}

void SimulatedEngine::fork(SequenceId parent, SequenceId child, std::uint64_t seed) {
  scheduler_.fork(parent, child);
  Sequence copy = sequences_.at(parent);
  copy.request.id = child;
  copy.request.seed = seed;
  copy.request.scores_prompt = false;  // its parent has done that
  bool joins = joined_.contains(parent);
  for (const ScheduledChunk& chunk : plan_.chunks) {
    if (!is_under_way_ || chunk.id != parent) continue;
    joins = joins || chunk.samples;
    if (!chunk.samples) copy.num_computed = chunk.start;  // what it computes now is not shared
  }
  if (joins) joined_.insert(child);
  sequences_[child] = std::move(copy);
  check();
}

void SimulatedEngine::verify_plan() const {
  std::set<SequenceId> ids;
  std::set<SlotId> delta_slots;
  std::set<BlockId> written;
  std::int32_t num_tokens = 0, num_logit_rows = 0;
  SlotId last_slot = kNoSlot;
  for (const ScheduledChunk& chunk : plan_.chunks) {
    const auto found = sequences_.find(chunk.id);
    demand(found != sequences_.end(), "sequence ", chunk.id, " is planned but gone");
    const Sequence& sequence = found->second;
    demand(ids.insert(chunk.id).second, "sequence ", chunk.id, " is planned twice");
    demand(chunk.slot >= last_slot, "chunks are not sorted by slot");
    last_slot = chunk.slot;
    demand(chunk.variant == sequence.request.variant, "wrong variant");
    if (chunk.variant == kBaseVariant) {
      demand(chunk.slot == kNoSlot, "the base has a slot");
    } else {
      delta_slots.insert(chunk.slot);
      const auto held = resident_.find(chunk.slot);
      demand(held != resident_.end() && held->second == chunk.variant, "slot ", chunk.slot,
             " does not hold variant ", chunk.variant);
    }
    const auto num_known = static_cast<std::int32_t>(sequence.tokens.size());
    demand(chunk.num_tokens > 0 && chunk.start + chunk.num_tokens <= num_known,
           "a chunk beyond the known tokens");
    if (sequence.num_computed < 0) {
      demand(chunk.start % config_.block_size == 0, "a cached prefix of part of a block");
      demand(chunk.start == 0 || (sequence.request.use_prefix_cache && config_.prefix_caching),
             "a cached prefix for a sequence that wants none");
    } else {
      demand(chunk.start == sequence.num_computed, "sequence ", chunk.id, " computed ",
             sequence.num_computed, ", its chunk starts at ", chunk.start);
    }
    demand(chunk.samples == (chunk.start + chunk.num_tokens == num_known), "samples is wrong");
    demand(
        std::equal(chunk.tokens.begin(), chunk.tokens.end(), sequence.tokens.begin() + chunk.start,
                   sequence.tokens.begin() + chunk.start + chunk.num_tokens,
                   [](std::int32_t planned, std::int32_t token) {
                     return planned == token || planned == kUnknownToken;
                   }),
        "sequence ", chunk.id, " has wrong tokens in its chunk");
    const std::int32_t end = chunk.start + chunk.num_tokens;
    demand(static_cast<std::int32_t>(chunk.blocks.size()) * config_.block_size >= end,
           "a block table that is too short");
    for (std::int32_t i = chunk.start / config_.block_size; i * config_.block_size < end; ++i) {
      demand(written.insert(chunk.blocks[static_cast<std::size_t>(i)]).second,
             "two chunks write the same block");
    }
    num_tokens += chunk.num_tokens;
    // The last row of a prompt scores nothing: it samples.
    const auto num_prompt = static_cast<std::int32_t>(sequence.request.prompt.size());
    const std::int32_t num_scored = sequence.request.scores_prompt
                                        ? std::max(0, std::min(num_prompt - 1, end) - chunk.start)
                                        : 0;
    num_logit_rows += num_scored + (chunk.samples ? 1 : 0);
  }
  demand(num_tokens == plan_.num_tokens && num_tokens <= config_.max_batch_tokens, num_tokens,
         " tokens in a step");
  const std::int32_t max_logit_rows =
      config_.max_batch_logit_rows == 0 ? config_.max_batch_tokens : config_.max_batch_logit_rows;
  demand(num_logit_rows <= plan_.num_logit_rows && plan_.num_logit_rows <= max_logit_rows,
         num_logit_rows, " logit rows in a step of ", plan_.num_logit_rows);
  demand(static_cast<std::int32_t>(ids.size()) <= config_.max_batch_sequences, "too many chunks");
  demand(static_cast<std::int32_t>(delta_slots.size()) <= config_.max_variants_per_batch,
         delta_slots.size(), " deltas in a step");
  for (const SequenceId id : plan_.preempted) {
    demand(!ids.contains(id), "sequence ", id, " is preempted and planned in one step");
  }
  demand(!plan_.chunks.empty() || !scheduler_.has_work() || !loading_.empty() || is_under_way_,
         "nothing is planned though nothing is waited for");
}

// Beside decodes prefills have no more rows than the limit, and leave none that they want.
void SimulatedEngine::verify_prefill_limit() const {
  bool has_decode = false, wants_more = false;
  std::int32_t num_rows = 0;
  for (const ScheduledChunk& chunk : plan_.chunks) {
    const Sequence& sequence = sequences_.at(chunk.id);
    const bool lacks_one = chunk.start + 1 == static_cast<std::int32_t>(sequence.tokens.size());
    has_decode = has_decode || (lacks_one && sequence.num_computed >= 0);
    if (lacks_one) continue;
    num_rows += chunk.num_tokens;
    wants_more = wants_more || (!chunk.samples && !sequence.request.scores_prompt);
  }
  if (!has_decode || config_.prefill_chunk_tokens == 0) return;
  demand(num_rows <= config_.prefill_chunk_tokens, num_rows, " prompt rows beside decodes");
  demand(!wants_more || num_rows == config_.prefill_chunk_tokens ||
             plan_.num_tokens == config_.max_batch_tokens,
         "only ", num_rows, " prompt rows beside decodes, and more are wanted");
}

void SimulatedEngine::begin_step() {
  const Plan before = std::move(plan_);
  const bool is_ahead = is_under_way_;
  std::vector<Scheduler::Outcome> outcomes;
  if (is_ahead) {
    outcomes = draw(before);
    scheduler_.advance(before);
    ++num_steps_ahead_;
  }
  plan_ = scheduler_.plan();
  cancelled_.clear();
  joined_.clear();
  for (const SequenceId id : plan_.preempted) sequences_.at(id).num_computed = -1;
  for (const DeltaLoad& load : plan_.loads) {
    for (const SlotId slot : load.evicted) {
      demand(resident_.erase(slot) == 1, "slot ", slot, " is evicted but not resident");
      ++num_evictions_;
    }
    demand(!resident_.contains(load.slot) && !loading_.contains(load.slot), "slot ", load.slot,
           " is loaded into while in use");
    loading_[load.slot] = {load.variant, load_steps};
  }
  check();
  verify_plan();
  verify_prefill_limit();
  is_under_way_ = !plan_.chunks.empty();
  if (is_under_way_) ++num_steps_;
  compute();
  if (is_ahead) commit(before, outcomes);
}

void SimulatedEngine::compute() {
  const auto block_size = static_cast<std::size_t>(config_.block_size);
  for (const BlockCopy& copy : plan_.copies) {
    std::copy_n(kv_.begin() + copy.from * config_.block_size, block_size,
                kv_.begin() + copy.to * config_.block_size);
    ++num_copies_;
  }
  const auto cell = [&](const ScheduledChunk& chunk, std::size_t position) -> std::uint64_t& {
    const auto block = static_cast<std::size_t>(chunk.blocks[position / block_size]);
    return kv_[block * block_size + position % block_size];
  };
  // As on a device: first every row's keys are stored, then every row attends.
  for (const ScheduledChunk& chunk : plan_.chunks) {
    Sequence& sequence = sequences_.at(chunk.id);
    const auto start = static_cast<std::size_t>(chunk.start);
    std::uint64_t value = chain(sequence, start);
    for (std::size_t i = start; i < start + chunk.tokens.size(); ++i) {
      value = mix(value, static_cast<std::uint64_t>(sequence.tokens[i]));
      cell(chunk, i) = value;
    }
    sequence.num_computed = chunk.start + chunk.num_tokens;
    num_computed_ += chunk.num_tokens;
  }
  for (const ScheduledChunk& chunk : plan_.chunks) {
    const Sequence& sequence = sequences_.at(chunk.id);
    std::uint64_t value = chain(sequence, 0);
    for (std::size_t i = 0; i < static_cast<std::size_t>(sequence.num_computed); ++i) {
      value = mix(value, static_cast<std::uint64_t>(sequence.tokens[i]));
      demand(cell(chunk, i) == value, "sequence ", chunk.id, " attends to another's position ", i);
    }
  }
}

// The outcomes of a plan that is computed. Its sequences get their tokens.
std::vector<Scheduler::Outcome> SimulatedEngine::draw(const Plan& plan) {
  std::vector<Scheduler::Outcome> outcomes;
  const auto sample = [&](SequenceId id) {
    Sequence& sequence = sequences_.at(id);
    const auto num_new =
        static_cast<std::int32_t>(sequence.tokens.size() - sequence.request.prompt.size());
    Scheduler::Outcome outcome{id, -1, true};
    if (num_new != sequence.request.fails_after) {
      const std::uint64_t value = chain(sequence, sequence.tokens.size());
      outcome.token = static_cast<std::int32_t>(mix(value, sequence.request.seed) % kVocabulary);
      outcome.finished = num_new + 1 >= sequence.request.num_new;
    }
    outcomes.push_back(outcome);
    last_progress_[sequence.request.variant] = num_steps_;
    sequence.tokens.push_back(std::max(outcome.token, 0));
  };
  for (const ScheduledChunk& chunk : plan.chunks) {
    if (!chunk.samples) continue;
    if (cancelled_.contains(chunk.id)) {
      if (rng_() % 2 == 0) outcomes.push_back({chunk.id, 1, false});  // late news: ignored
    } else {
      sample(chunk.id);
    }
  }
  for (const SequenceId id : joined_) sample(id);
  std::shuffle(outcomes.begin(), outcomes.end(), rng_);
  return outcomes;
}

void SimulatedEngine::commit(const Plan& plan, const std::vector<Scheduler::Outcome>& outcomes) {
  scheduler_.commit(plan, outcomes);
  for (const Scheduler::Outcome& outcome : outcomes) {
    if (!outcome.finished || sequences_.erase(outcome.id) == 0) continue;
    demand(!scheduler_.has(outcome.id), "sequence ", outcome.id, " is there after its end");
    cancelled_.insert(outcome.id);  // for the plan that was made ahead of this
    ++num_finished_;
  }
  for (const auto& [id, sequence] : sequences_) {
    const auto tokens = scheduler_.tokens(id);
    demand(std::equal(tokens.begin(), tokens.end(), sequence.tokens.begin(), sequence.tokens.end()),
           "sequence ", id, " has other tokens than it was given");
  }
  check();
}

void SimulatedEngine::finish_step() {
  if (is_under_way_ && plans_ahead && joined_.empty() && rng_() % 8 != 0) {
    advance_loads();
    return;
  }
  const bool was_under_way = std::exchange(is_under_way_, false);
  const Plan plan = std::move(plan_);
  plan_ = {};
  if (was_under_way) commit(plan, draw(plan));
  advance_loads();
  observe_waits();
  check();
}

void SimulatedEngine::advance_loads() {
  for (auto entry = loading_.begin(); entry != loading_.end();) {
    if (--entry->second.steps_left > 0) {
      ++entry;
      continue;
    }
    const SlotId slot = entry->first;
    const VariantId variant = entry->second.variant;
    entry = loading_.erase(entry);
    if (std::bernoulli_distribution(load_failure_chance)(rng_)) {
      std::set<SequenceId> expected, dropped;
      for (const auto& [id, sequence] : sequences_) {
        if (sequence.request.variant == variant) expected.insert(id);
      }
      for (const SequenceId id : scheduler_.delta_load_failed(slot)) dropped.insert(id);
      demand(dropped == expected, "a failed load names ", dropped.size(), " sequences, ",
             expected.size(), " waited");
      for (const SequenceId id : dropped) sequences_.erase(id);
      num_failed_by_load_ += static_cast<std::int64_t>(dropped.size());
    } else {
      scheduler_.delta_loaded(slot);
      resident_[slot] = variant;
    }
  }
}

void SimulatedEngine::observe_waits() {
  std::set<VariantId> wanting;
  for (const auto& [id, sequence] : sequences_) wanting.insert(sequence.request.variant);
  for (const auto& [variant, bytes] : variants_) {
    if (!wanting.contains(variant)) {
      last_progress_[variant] = num_steps_;
      continue;
    }
    const std::int64_t wait = num_steps_ - last_progress_[variant];
    if (wait <= longest_wait_) continue;
    longest_wait_ = wait;
    longest_waiter_ = variant;
  }
}

void SimulatedEngine::run_until_idle(std::int32_t max_steps) {
  for (std::int32_t i = 0; scheduler_.has_work() || is_loading(); ++i) {
    demand(i < max_steps, "still at work after ", max_steps, " steps");
    step();
  }
  const bool planned_ahead = std::exchange(plans_ahead, false);
  finish_step();
  plans_ahead = planned_ahead;
}

std::vector<SequenceId> SimulatedEngine::alive() const {
  std::vector<SequenceId> ids;
  for (const auto& [id, sequence] : sequences_) ids.push_back(id);
  return ids;
}

std::vector<VariantId> SimulatedEngine::variants() const {
  std::vector<VariantId> ids;
  for (const auto& [id, bytes] : variants_) ids.push_back(id);
  return ids;
}

std::int32_t SimulatedEngine::num_running_of(VariantId variant) const {
  return static_cast<std::int32_t>(
      std::count_if(sequences_.begin(), sequences_.end(), [&](const auto& entry) {
        return entry.second.request.variant == variant && entry.second.num_computed >= 0;
      }));
}

void SimulatedEngine::check() const {
  if (check_always) scheduler_.check();
}

}  // namespace deltazip
