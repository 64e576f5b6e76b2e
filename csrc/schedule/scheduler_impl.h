#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "deltazip/schedule/block_allocator.h"
#include "deltazip/schedule/delta_slots.h"
#include "deltazip/schedule/scheduler.h"

namespace deltazip {

struct ScheduledVariant;

struct Sequence {
  static constexpr std::uint64_t kNoTurn = std::numeric_limits<std::uint64_t>::max();

  SequenceId id = 0;
  ScheduledVariant* variant = nullptr;
  std::vector<std::int32_t> tokens;  // prompt and output
  std::int32_t num_prompt_tokens = 0, max_new_tokens = 0, priority = 0;
  std::uint64_t arrival = 0;
  bool use_prefix_cache = true, scores_prompt = false;
  Digest root;
  std::vector<Digest> keys;        // of the full blocks of `tokens`, as far as they were asked for
  std::vector<BlockId> blocks;     // empty while waiting
  std::int32_t num_computed = 0;   // tokens whose keys and values lie in `blocks`
  std::int32_t num_in_flight = 0;  // being computed by the plan under way
  bool samples_in_flight = false;  // that chunk ends at the last token
  bool is_settling = false;        // was in the plan that was advanced
  bool has_unknown = false;        // that plan sampled its last token, which is not known yet
  bool is_ending = false;          // and that token is its last by length: neither runs nor waits
  std::int32_t num_published = 0;  // blocks
  std::uint64_t turn = kNoTurn;    // order in which overdue sequences got their turn
  std::int32_t turn_tokens_left = 0;  // new tokens until the turn ends
  bool is_running = false, was_admitted = false;
  bool has_ended = false;                       // while in flight or settling
  bool keeps_pin = false;                       // and the plan still reads its delta
  const Scheduler::Outcome* outcome = nullptr;  // during commit() only

  bool has_turn() const { return turn != kNoTurn; }
  // Who goes first: turns, then priority, then arrival.
  auto rank() const { return std::tuple(turn, priority, arrival); }
};

struct OutranksFirst {
  bool operator()(const Sequence* a, const Sequence* b) const { return a->rank() < b->rank(); }
};

struct ScheduledVariant {
  VariantId id = kBaseVariant;
  std::int64_t num_bytes = 0;
  std::set<Sequence*, OutranksFirst> waiting;
  std::int32_t num_running = 0;
  SlotId slot = kNoSlot;        // loading or resident
  bool has_demand_pin = false;  // its sequences wait for more than the slot
  bool is_closing = false;      // drains for an overdue variant: admits none
  bool is_removing = false;     // refuses new sequences
  std::uint64_t closing_since = 0, seated_since = 0;
  std::uint64_t last_progress = 0;  // step of the last new token, or when it began to want one
  std::pair<std::uint64_t, VariantId> unserved_key;             // valid while is_unserved
  std::tuple<std::int32_t, std::uint64_t, VariantId> cold_key;  // valid while is_cold
  bool is_unserved = false, is_cold = false;

  bool is_base() const { return id == kBaseVariant; }
  Sequence* head() const { return waiting.empty() ? nullptr : *waiting.begin(); }
};

struct Scheduler::Impl {
  static constexpr std::int32_t kNoLimit = std::numeric_limits<std::int32_t>::max();

  explicit Impl(const SchedulerConfig& given);

  // --- scheduler_state.cpp: one sequence or variant moves from one state to another ---
  Sequence& find(SequenceId id) const;
  ScheduledVariant& find_variant(VariantId id) const;
  bool is_warm(const ScheduledVariant& variant) const;  // the base, or resident
  std::int32_t blocks_for(std::int64_t num_tokens) const;
  std::int32_t num_remaining(const Sequence& sequence) const;  // known tokens to be computed
  void enqueue(Sequence& sequence);                            // into its variant's waiting set
  void admit(Sequence& sequence, bool with_turn);  // waiting -> running, with its cached prefix
  void start_running(Sequence& sequence);          // its blocks are set
  void preempt(Sequence& sequence, Plan& plan);    // running -> waiting, blocks given back
  void start_turn(Sequence& sequence);             // of a running one
  void end_turn(Sequence& sequence);
  void insert_running(Sequence& sequence);
  void leave_running(Sequence& sequence);  // keeps its blocks and its slot's pin
  void unpin(const Sequence& sequence);
  void release_blocks(Sequence& sequence);
  void forget(Sequence& sequence);  // ends it; in a plan under way: kept until its commit()
  void extend_keys(Sequence& sequence, std::int32_t num_blocks);
  void publish_full_blocks(Sequence& sequence);
  void refresh(ScheduledVariant& variant);  // indices and demand pin follow its state
  bool try_load(ScheduledVariant& variant, bool is_overdue, Plan& plan);
  void end_load(SlotId slot, bool is_loaded);

  // --- scheduler_plan.cpp: the phases of a plan, in this order ---
  void serve_overdue(Plan& plan);
  void displace_by_priority(Plan& plan);
  void schedule_running(Plan& plan);
  void admit_waiting(Plan& plan);
  void extend_prefills(Plan& plan);
  void order_loads(Plan& plan);
  void finish_plan(Plan& plan);

  void give_turns_to_stalled();
  void close_seats(std::span<ScheduledVariant* const> overdue, Plan& plan);
  std::vector<ScheduledVariant*> closable_seats();
  bool try_admit_overdue(Sequence& sequence, Plan& plan);
  Sequence* best_candidate() const;
  bool fits_now(Sequence& sequence);
  bool fits_beside(const Sequence& sequence, bool only_turns) const;
  BlockId take_free_block();
  bool take_blocks(Sequence& sequence, Plan& plan);
  std::int32_t prefill_share() const;
  void schedule(Sequence& sequence, std::int32_t num_tokens, Plan& plan);
  void extend(Sequence& sequence, ScheduledChunk& chunk, std::int32_t num_tokens, Plan& plan);

  // --- scheduler_commit.cpp: what a plan under way has given ---
  void judge(const std::vector<Sequence*>& planned, bool is_advanced,
             std::span<const Outcome> outcomes);
  void advance();
  void settle();

  void check() const;

  const SchedulerConfig config;
  const std::int32_t max_running;     // sequences of one step
  const std::int32_t max_logit_rows;  // at least one for each of them
  std::int32_t prefill_chunk_tokens = 0;
  BlockAllocator allocator;
  DeltaSlots slots;
  std::unordered_map<VariantId, std::unique_ptr<ScheduledVariant>> variants;
  std::unordered_map<SequenceId, std::unique_ptr<Sequence>> sequences;
  // Ended in the plan under way, whose spans point into them; and in the one that was advanced.
  std::vector<std::unique_ptr<Sequence>> ended_in_flight, ended_settling;
  std::vector<Sequence*> running;    // sorted by rank
  std::vector<Sequence*> in_flight;  // of the plan under way
  std::size_t num_planned = 0;       // of in_flight: chunks; the rest are children forked meanwhile
  std::vector<Sequence*> settling;   // of the plan that was advanced and not committed
  std::size_t num_advanced = 0;      // its chunks
  std::vector<ScheduledVariant*> slot_variant;  // by slot
  // Variants that wait and have nothing running, longest without progress first.
  std::set<std::pair<std::uint64_t, VariantId>> unserved;
  // Variants that wait and have no slot, by the rank of their head.
  std::set<std::tuple<std::int32_t, std::uint64_t, VariantId>> cold;
  std::int32_t num_waiting = 0;
  std::int32_t num_seats_taken = 0;  // deltas with a running sequence
  std::uint64_t step = 1, num_arrivals = 0, num_turns = 0;
  std::int64_t num_preemptions = 0, prefix_hit_tokens = 0, prefix_query_tokens = 0;

  // Of the plan being made.
  bool hold_places = false;         // an overdue sequence waits for a place or blocks
  bool hold_slots = false;          // an overdue variant waits for a slot
  std::int32_t num_open_seats = 0;  // not taken and not promised to an overdue variant
  std::int32_t prefill_rows_left = kNoLimit;
};

}  // namespace deltazip
