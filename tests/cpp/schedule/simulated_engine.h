#pragma once

#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "deltazip/schedule/scheduler.h"

namespace deltazip {

// An engine without a model. A KV position holds a number that depends on the variant, the salt and
// every token up to it, so any wrong block, copy, share or recomputation shows as a wrong number.
// The next token is a pure function of that number and the sequence's seed, so every sequence has
// exactly one right output, whatever runs beside it. Wrong plans throw std::logic_error.
class SimulatedEngine {
 public:
  struct Request {
    SequenceId id = 0;
    VariantId variant = kBaseVariant;
    std::vector<std::int32_t> prompt;
    std::int32_t num_new = 1;  // it ends after so many tokens
    std::int32_t max_new = 0;  // promised to the scheduler; 0: num_new
    std::int32_t priority = 0;
    std::uint32_t salt = 0;
    std::uint64_t seed = 0;
    bool use_prefix_cache = true;
    bool scores_prompt = false;     // wants the logits of each row of it
    std::int32_t fails_after = -1;  // ends in an error (token -1) at that new token
  };

  SimulatedEngine(const SchedulerConfig& config, std::uint32_t seed);

  void add_variant(VariantId variant, std::int64_t num_bytes);
  bool try_remove_variant(VariantId variant);
  void submit(const Request& request);
  void cancel(SequenceId id);
  void set_prefill_chunk_tokens(std::int32_t num_tokens);
  // One choice more of a request that sampled before, or is sampling in the plan under way.
  void fork(SequenceId parent, SequenceId child, std::uint64_t seed);
  bool can_fork(SequenceId parent) const;

  void begin_step();   // plan, verify, compute; if a plan is under way, ahead of its tokens
  void finish_step();  // sample, commit; with plans_ahead it may be left to the next begin_step()
  void step() {
    begin_step();
    finish_step();
  }
  void run_until_idle(std::int32_t max_steps);

  Scheduler& scheduler() { return scheduler_; }
  const Plan& plan() const { return plan_; }
  std::vector<SequenceId> alive() const;
  std::vector<VariantId> variants() const;
  std::int64_t num_steps() const { return num_steps_; }
  std::int64_t num_steps_ahead() const { return num_steps_ahead_; }
  std::int64_t num_finished() const { return num_finished_; }
  std::int64_t num_failed_by_load() const { return num_failed_by_load_; }
  std::int64_t num_copies() const { return num_copies_; }
  std::int64_t num_computed() const { return num_computed_; }
  std::int64_t num_evictions() const { return num_evictions_; }
  // The longest any variant with work went without a new token, in steps.
  std::int64_t longest_wait() const { return longest_wait_; }
  VariantId longest_waiter() const { return longest_waiter_; }
  std::int32_t num_running_of(VariantId variant) const;
  bool is_loading() const { return !loading_.empty(); }

  std::int32_t load_steps = 2;  // how long a load takes
  double load_failure_chance = 0.0;
  bool check_always = true;
  bool plans_ahead = false;

 private:
  struct Sequence {
    Request request;
    std::vector<std::int32_t> tokens;
    std::int32_t num_computed = -1;  // -1: not begun, or preempted
  };
  struct Loading {
    VariantId variant;
    std::int32_t steps_left;
  };

  std::uint64_t chain(const Sequence& sequence, std::size_t num_tokens) const;
  void verify_plan() const;
  void verify_prefill_limit() const;
  void compute();
  std::vector<Scheduler::Outcome> draw(const Plan& plan);
  void commit(const Plan& plan, const std::vector<Scheduler::Outcome>& outcomes);
  void advance_loads();
  void observe_waits();
  void check() const;

  SchedulerConfig config_;
  Scheduler scheduler_;
  std::mt19937 rng_;
  std::map<SequenceId, Sequence> sequences_;
  std::map<VariantId, std::int64_t> variants_;
  std::vector<std::uint64_t> kv_;  // [num_blocks * block_size]
  std::map<SlotId, VariantId> resident_;
  std::map<SlotId, Loading> loading_;
  Plan plan_;
  std::set<SequenceId> joined_;     // children forked while the plan is under way
  std::set<SequenceId> cancelled_;  // since the plan was made
  std::map<VariantId, std::int64_t> last_progress_;
  std::int64_t num_steps_ = 0, num_steps_ahead_ = 0, num_finished_ = 0, num_failed_by_load_ = 0,
               num_copies_ = 0, num_computed_ = 0, num_evictions_ = 0, longest_wait_ = 0;
  VariantId longest_waiter_ = kBaseVariant;
  bool is_under_way_ = false;
};

}  // namespace deltazip
