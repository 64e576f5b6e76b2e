#include "engine/loop.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <utility>

#include "engine/sampling.h"

namespace deltazip::engine {
namespace {

using std::chrono::milliseconds;

// While only a load can change anything, the inbox is looked at this often.
constexpr int kLoadWaitMs = 5;
constexpr milliseconds kIdleWait{10};
// The scheduler must find something to run for waiting requests within this many turns.
constexpr std::int32_t kMaxIdleTurns = 500;

// A slot given to another may be one that the step under way still reads.
bool overwrites_slots_of(const Plan& under_way, std::span<const DeltaLoad> loads) {
  const auto is_read = [&](SlotId slot) { return under_way.reads(slot); };
  return std::ranges::any_of(loads, [&](const DeltaLoad& load) {
    return is_read(load.slot) || std::ranges::any_of(load.evicted, is_read);
  });
}

}  // namespace

Loop::Loop(Resources& resources, FrontDesk& desk, Outbox& outbox, LogSink log)
    : resources_(resources),
      desk_(desk),
      outbox_(outbox),
      log_(std::move(log)),
      scheduler_(resources.scheduler_config()),
      slots_(*resources.deltas, *resources.model, resources.config.num_delta_slots),
      builder_(resources.config.block_size, [this](SlotId slot) { return slots_.weights(slot); }),
      stream_(resources.backend->create_stream()),
      runs_apart_(!resources.backend->shares_host_memory()) {
  for (Step& step : steps_) step.computed = resources.backend->create_event();
  publish();
  thread_ = std::thread([this] { run(); });
}

Loop::~Loop() {
  desk_.stop();
  join();
}

void Loop::join() {
  if (thread_.joinable()) thread_.join();
}

void Loop::run() noexcept {
  std::string failure;
  try {
    while (!desk_.stop_requested()) turn();
    if (under_way_ != nullptr) finish(*under_way_);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  end(failure);
}

// On a device one step is always under way: while it runs, the next is planned as if every sequence
// went on, and queued behind it. Then its tokens are taken.
void Loop::turn() {
  accept();
  if (!runs_apart_) publish();
  if (under_way_ != nullptr && under_way_->is_awaited) finish(*under_way_);
  Step* const before = under_way_;
  if (before != nullptr) scheduler_.advance(before->plan);
  Step& step = before == &steps_[0] ? steps_[1] : steps_[0];
  step.plan = scheduler_.plan();
  note(step.plan);
  if (before != nullptr && overwrites_slots_of(before->plan, step.plan.loads)) wait_for(*before);
  start_loads(step.plan);
  if (step.plan.empty()) {
    if (before != nullptr) return finish(*before);
    publish();
    return wait_for_news();
  }

  step.begun = std::chrono::steady_clock::now();
  builder_.build(step.plan, requests_, step.input);
  launch(step);
  if (before != nullptr) finish(*before);
  under_way_ = &step;
  // On a device, what the step before gave goes out while this one runs.
  if (runs_apart_) return publish();
  finish(step);
  publish();
}

void Loop::wait_for(Step& step) { step.computed->synchronize(); }

void Loop::finish(Step& step) {
  wait_for(step);
  commit(step);
  if (under_way_ == &step) under_way_ = nullptr;
  const auto now = std::chrono::steady_clock::now();
  const auto seconds = now - std::max(step.begun, last_finish_);
  last_finish_ = now;
  stats_.last_step_seconds = std::chrono::duration<double>(seconds).count();
  ++stats_.num_steps;
  num_idle_turns_ = 0;
  desk_.progress();
}

void Loop::wait_for_news() {
  if (slots_.is_loading()) {
    resources_.deltas->wait(kLoadWaitMs);
  } else if (requests_.empty()) {
    desk_.wait(std::chrono::hours(1));
  } else {
    ++num_idle_turns_;
    DZ_INTERNAL(num_idle_turns_ < kMaxIdleTurns, "requests wait, but for ", num_idle_turns_,
                " turns nothing could run");
    desk_.wait(kIdleWait);
  }
}

void Loop::launch(Step& step) {
  Backend& backend = *resources_.backend;
  for (const BlockCopy& copy : step.plan.copies) {
    resources_.kv->copy_block(backend, copy.from, copy.to, *stream_);
  }
  const ConstTensorView logits =
      resources_.model->forward(step.input.batch, *resources_.kv, *stream_);
  sample(step, logits);
  step.computed->record(*stream_);
}

void Loop::sample(Step& step, ConstTensorView logits) {
  const std::vector<LogitUse>& uses = step.input.uses;
  const auto row_for = [&](const LogitUse& use, std::int32_t choice_index) {
    const ActiveRequest& request = *use.choice.request;
    const SamplingParams& params = request.request.sampling;
    if (use.scored_prompt >= 0) {
      return scoring_row(request.request.prompt[static_cast<std::size_t>(use.scored_prompt)],
                         params.prompt_logprobs);
    }
    const ChoiceRef choice{use.choice.request, choice_index};
    return sampling_row(params, choice.seed(), request.stop_tokens,
                        scheduler_.tokens(step.plan.chunks[use.chunk].id),
                        request.request.prompt.size());
  };

  // All rows are laid out before the first is handed over: they must not move.
  step.rows.clear();
  step.fork_rows.clear();
  step.fork_begin.assign(1, 0);
  step.is_awaited = false;
  for (const LogitUse& use : uses) {
    use.choice.choice().sampled_row = static_cast<std::int32_t>(step.rows.size());
    step.rows.push_back(row_for(use, use.choice.index));
    step.is_awaited = step.is_awaited || use.scored_prompt >= 0 ||
                      uses_history(use.choice.request->request.sampling);
    const auto num_choices = static_cast<std::int32_t>(use.choice.request->choices.size());
    const bool is_first_token = use.choice.index == 0 && use.choice.choice().num_output == 0;
    for (std::int32_t other = 1; other < num_choices; ++other) {
      if (use.scored_prompt < 0 && is_first_token) step.fork_rows.push_back(row_for(use, other));
    }
    step.fork_begin.push_back(step.fork_rows.size());
  }
  step.is_awaited = step.is_awaited || !step.fork_rows.empty();
  step.samples.resize(uses.size());
  step.fork_samples.resize(step.fork_rows.size());
  if (uses.empty()) return;

  Ops& ops = resources_.backend->ops();
  ops.sample(step.samples, logits, step.rows, *stream_,
             resources_.model->sampled().first(uses.size()));
  const std::size_t row_bytes = static_cast<std::size_t>(logits.size(1)) * size_of(logits.dtype);
  for (std::size_t i = 0; i < uses.size(); ++i) {
    const ConstTensorView logit_row{static_cast<const std::byte*>(logits.data) + i * row_bytes,
                                    logits.dtype,
                                    {1, logits.size(1)}};
    for (std::size_t fork = step.fork_begin[i]; fork < step.fork_begin[i + 1]; ++fork) {
      ops.sample({&step.fork_samples[fork], 1}, logit_row, {&step.fork_rows[fork], 1}, *stream_);
    }
  }
}

void Loop::end(const std::string& failure) {
  has_failed_ = !failure.empty();
  const std::string error = has_failed_ ? "the engine has stopped: " + failure : "";
  const Finish finish = has_failed_ ? Finish::kError : Finish::kCancelled;
  if (has_failed_) {
    log_(LogLevel::kError, error);
    // What was launched may still write to steps_.
    try {
      stream_->synchronize();
    } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): a lost device says so again
    }
  }

  for (ActiveRequest* request : requests_.all()) end_request(*request, finish, error);
  publish();
  std::vector<OutputEvent> late;
  for (Command& command : desk_.close(failure)) {
    const auto* submit = std::get_if<Submit>(&command);
    for (std::int32_t i = 0; submit != nullptr && i < submit->request.sampling.n; ++i) {
      OutputEvent event;
      event.request_id = submit->request.id;
      event.choice = i;
      event.finish = finish;
      event.error = error;
      late.push_back(std::move(event));
    }
  }
  outbox_.push(std::move(late));
  outbox_.close();
}

void Loop::set_prefill_chunk_tokens(std::int32_t num_tokens) {
  scheduler_.set_prefill_chunk_tokens(num_tokens);
}

void Loop::check() const {
  scheduler_.check();
  requests_.check();
}

}  // namespace deltazip::engine
