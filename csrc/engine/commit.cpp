// What goes out: sampled tokens become outcomes for the scheduler and events for the caller.

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "engine/loop.h"
#include "engine/sampling.h"

namespace deltazip::engine {
namespace {

std::string not_finite(const ActiveRequest& request, std::int64_t position) {
  return detail::concat("request ", request.request.id, ": the logits of variant '",
                        request.variant->name, "' are not finite at position ", position);
}

OutputEvent event_for(ChoiceRef choice) {
  OutputEvent event;
  event.request_id = choice.request->request.id;
  event.choice = choice.index;
  event.num_cached_prompt_tokens = std::max(0, choice.request->num_cached_prompt_tokens);
  return event;
}

}  // namespace

void Loop::note(const Plan& plan) {
  for (const SequenceId id : plan.preempted) set_running(requests_.at(id), false);
  for (const ScheduledChunk& chunk : plan.chunks) {
    const ChoiceRef choice = requests_.at(chunk.id);
    set_running(choice, true);
    ActiveRequest& request = *choice.request;
    if (request.num_cached_prompt_tokens >= 0) continue;
    request.num_cached_prompt_tokens = chunk.start;
    stats_.num_prompt_tokens += request.prompt_length();
    request.variant->num_prompt_tokens += request.prompt_length();
  }
}

void Loop::commit(Step& step) {
  const StepInput& input = step.input;
  const auto sequence_of = [&](const LogitUse& use) { return step.plan.chunks[use.chunk].id; };
  // Some may have ended while the step ran.
  const auto is_wanted = [&](const LogitUse& use) { return requests_.has(sequence_of(use)); };
  std::map<ActiveRequest*, std::string> broken;
  for (std::size_t i = 0; i < input.uses.size(); ++i) {
    if (!is_wanted(input.uses[i])) continue;
    bool is_finite = step.samples[i].is_finite;
    for (const SampledToken& fork : step.forks_of(i)) is_finite = is_finite && fork.is_finite;
    ActiveRequest* request = input.uses[i].choice.request;
    const auto row = static_cast<std::size_t>(input.batch.logit_rows[i]);
    if (!is_finite) broken.emplace(request, not_finite(*request, input.batch.positions[row]));
  }

  std::vector<Scheduler::Outcome> outcomes;
  for (std::size_t i = 0; i < input.uses.size(); ++i) {
    const LogitUse& use = input.uses[i];
    if (!is_wanted(use)) continue;
    const SampledToken& sampled = step.samples[i];
    const SequenceId sequence = sequence_of(use);
    ActiveRequest& request = *use.choice.request;
    if (broken.contains(&request)) {
      if (use.scored_prompt < 0) outcomes.push_back({sequence, -1, true});
      continue;
    }
    if (use.scored_prompt >= 0) {
      request.prompt_logprobs[static_cast<std::size_t>(use.scored_prompt)] = to_logprobs(sampled);
      continue;
    }
    std::int32_t other = 0;
    for (const SampledToken& first : step.forks_of(i)) {
      const ChoiceRef choice{&request, ++other};
      const SequenceId child = requests_.open_sequence(choice);
      ++request.variant->num_waiting;
      set_running(choice, true);
      scheduler_.fork(sequence, child);
      outcomes.push_back({child, first.token, take_token(choice, first)});
    }
    outcomes.push_back({sequence, sampled.token, take_token(use.choice, sampled)});
  }
  scheduler_.commit(step.plan, outcomes);
  for (const auto& [request, error] : broken) end_request(*request, Finish::kError, error);
  bury();
}

bool Loop::take_token(ChoiceRef choice, const SampledToken& sampled) {
  ActiveRequest& request = *choice.request;
  Choice& state = choice.choice();
  const SamplingParams& params = request.request.sampling;
  Verdict verdict = judge(params, request.stop_tokens, state.num_output, sampled.token);
  if (state.is_unwanted) verdict = {.finish = Finish::kCancelled, .is_output = false};

  OutputEvent event = event_for(choice);
  event.finish = verdict.finish;
  if (choice.index == 0 && state.num_output == 0) {
    event.prompt_logprobs = std::move(request.prompt_logprobs);
    request.prompt_logprobs.assign(event.prompt_logprobs.size(), TokenLogprobs{});  // all done
  }
  if (verdict.is_output) {
    event.tokens.push_back(sampled.token);
    if (params.logprobs >= 0) event.logprobs.push_back(to_logprobs(sampled));
    ++state.num_output;
  } else if (verdict.finish == Finish::kStop) {
    event.stop_token = sampled.token;
  }
  events_.push_back(std::move(event));
  ++stats_.num_output_tokens;
  ++request.variant->num_output_tokens;

  const bool is_last = verdict.finish != Finish::kNone;
  if (is_last) end_choice(choice);
  return is_last;
}

void Loop::set_running(ChoiceRef choice, bool is_running) {
  Choice& state = choice.choice();
  if (state.is_running == is_running) return;
  state.is_running = is_running;
  VariantRecord& variant = *choice.request->variant;
  variant.num_running += is_running ? 1 : -1;
  variant.num_waiting += is_running ? -1 : 1;
}

void Loop::end_choice(ChoiceRef choice) {
  Choice& state = choice.choice();
  ActiveRequest& request = *choice.request;
  if (state.sequence != kNoSequence) {
    --(state.is_running ? request.variant->num_running : request.variant->num_waiting);
    requests_.close_sequence(choice);
  }
  state.is_done = true;
  if (--request.num_open > 0) return;
  ended_.push_back(request.request.id);
  ++stats_.num_finished;
}

void Loop::cancel_choice(ChoiceRef choice) {
  Choice& state = choice.choice();
  if (state.is_done) return;
  state.is_unwanted = true;
  const bool is_last = std::ranges::all_of(
      choice.request->choices, [](const Choice& each) { return each.is_done || each.is_unwanted; });
  if (is_last) return end_request(*choice.request, Finish::kCancelled, "");
  if (state.num_output == 0) return;  // its siblings are forked from choice 0 at the first token
  const SequenceId sequence = state.sequence;
  OutputEvent event = event_for(choice);
  event.finish = Finish::kCancelled;
  events_.push_back(std::move(event));
  end_choice(choice);
  if (sequence != kNoSequence) scheduler_.cancel(sequence);
}

void Loop::end_request(ActiveRequest& request, Finish finish, const std::string& error) {
  if (request.num_open == 0) return;
  for (std::size_t i = 0; i < request.choices.size(); ++i) {
    const ChoiceRef choice{&request, static_cast<std::int32_t>(i)};
    if (choice.choice().is_done) continue;
    const SequenceId sequence = choice.choice().sequence;
    OutputEvent event = event_for(choice);
    event.finish = finish;
    event.error = error;
    events_.push_back(std::move(event));
    end_choice(choice);
    if (sequence != kNoSequence && !has_failed_) scheduler_.cancel(sequence);
  }
  --stats_.num_finished;
  ++(finish == Finish::kCancelled ? stats_.num_cancelled : stats_.num_errors);
}

void Loop::bury() {
  for (const std::int64_t id : ended_) requests_.erase(id);
  buried_.insert(buried_.end(), ended_.begin(), ended_.end());
  ended_.clear();
}

void Loop::publish() {
  bury();
  for (const std::int64_t id : buried_) desk_.forget(id);
  buried_.clear();
  stats_.scheduler = scheduler_.stats();
  // Before the events: who has read a request's last event finds it gone from the counters.
  desk_.publish(stats_, !requests_.empty() || slots_.is_loading());
  outbox_.push(std::exchange(events_, {}));
}

}  // namespace deltazip::engine
