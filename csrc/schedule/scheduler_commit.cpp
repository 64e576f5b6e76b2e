// What a plan under way has given: first how much, then which tokens.

#include <algorithm>
#include <utility>

#include "deltazip/base/error.h"
#include "schedule/scheduler_impl.h"

namespace deltazip {

void Scheduler::advance(const Plan& plan) {
  Impl& impl = *impl_;
  DZ_INTERNAL(impl.num_advanced == 0, "the plan that was advanced is not committed");
  DZ_INTERNAL(plan.chunks.size() == impl.num_planned && impl.num_planned > 0,
              "the plan under way has ", impl.num_planned, " chunks, the one advanced has ",
              plan.chunks.size());
  impl.advance();
}

void Scheduler::commit(const Plan& plan, std::span<const Outcome> outcomes) {
  Impl& impl = *impl_;
  // Everything is judged before anything changes.
  const bool is_advanced = impl.num_advanced > 0;
  const std::size_t num_chunks = is_advanced ? impl.num_advanced : impl.num_planned;
  DZ_INTERNAL(plan.chunks.size() == num_chunks, "the plan under way has ", num_chunks,
              " chunks, the one committed has ", plan.chunks.size());
  impl.judge(is_advanced ? impl.settling : impl.in_flight, is_advanced, outcomes);
  if (!is_advanced) impl.advance();
  impl.settle();
}

// Gives each sequence of the plan its outcome.
void Scheduler::Impl::judge(const std::vector<Sequence*>& planned, bool is_advanced,
                            std::span<const Outcome> outcomes) {
  const auto is_planned = [&](const Sequence& sequence) {
    return is_advanced ? sequence.is_settling : sequence.num_in_flight > 0;
  };
  const auto samples = [&](const Sequence& sequence) {
    return is_advanced ? sequence.has_unknown : sequence.samples_in_flight;
  };
  const auto has_ended = [&](SequenceId id) {
    const auto is_it = [id](const auto& ended) { return ended->id == id; };
    return std::ranges::any_of(ended_in_flight, is_it) ||
           std::ranges::any_of(ended_settling, is_it);
  };
  for (Sequence* sequence : planned) sequence->outcome = nullptr;
  for (const Outcome& outcome : outcomes) {
    const auto found = sequences.find(outcome.id);
    if (found == sequences.end()) continue;  // cancelled meanwhile
    Sequence& sequence = *found->second;
    if (!is_planned(sequence) && has_ended(outcome.id)) continue;  // its id came again
    DZ_INTERNAL(is_planned(sequence), "an outcome for sequence ", outcome.id,
                ", which is not in the plan");
    DZ_INTERNAL(outcome.finished || samples(sequence), "a token for sequence ", outcome.id,
                ", whose chunk does not sample");
    sequence.outcome = &outcome;
  }
  for (const Sequence* sequence : planned) {
    if (sequence->has_ended || !samples(*sequence)) continue;
    DZ_INTERNAL(sequence->outcome != nullptr, "no outcome for sequence ", sequence->id);
    const auto num_tokens =
        static_cast<std::int32_t>(sequence->tokens.size()) - (is_advanced ? 1 : 0);
    DZ_INTERNAL(sequence->outcome->finished ||
                    num_tokens < sequence->num_prompt_tokens + sequence->max_new_tokens,
                "sequence ", sequence->id, " goes on after ", sequence->max_new_tokens,
                " new tokens, its limit");
  }
}

void Scheduler::Impl::advance() {
  std::erase_if(in_flight, [](const Sequence* sequence) { return sequence->has_ended; });
  for (Sequence* sequence : in_flight) {
    sequence->num_computed += std::exchange(sequence->num_in_flight, 0);
    sequence->is_settling = true;
    if (!std::exchange(sequence->samples_in_flight, false)) continue;
    ScheduledVariant& variant = *sequence->variant;
    variant.last_progress = step;
    sequence->tokens.push_back(kUnknownToken);
    sequence->has_unknown = true;
    if (static_cast<std::int32_t>(sequence->tokens.size()) >=
        sequence->num_prompt_tokens + sequence->max_new_tokens) {
      leave_running(*sequence);
      sequence->is_ending = true;
      refresh(variant);
    }
  }
  settling = std::exchange(in_flight, {});
  ended_settling = std::exchange(ended_in_flight, {});
  num_advanced = std::exchange(num_planned, 0);
}

void Scheduler::Impl::settle() {
  for (Sequence* sequence : settling) {
    if (sequence->has_ended) continue;
    sequence->is_settling = false;
    const Outcome* outcome = std::exchange(sequence->outcome, nullptr);
    // What ended in an error may hold bad numbers: nobody else shall find it.
    if (outcome == nullptr || outcome->token >= 0) publish_full_blocks(*sequence);
    if (outcome == nullptr) continue;
    sequence->variant->last_progress = step;
    if (outcome->finished) {
      forget(*sequence);
      continue;
    }
    sequence->tokens.back() = outcome->token;
    sequence->has_unknown = false;
    if (sequence->has_turn() && --sequence->turn_tokens_left <= 0) end_turn(*sequence);
    refresh(*sequence->variant);
  }
  settling.clear();
  num_advanced = 0;
  for (const auto& ended : ended_settling) {
    if (ended->keeps_pin) unpin(*ended);
  }
  ended_settling.clear();
}

}  // namespace deltazip
