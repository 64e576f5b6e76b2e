#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "engine/batch_builder.h"
#include "engine/front_desk.h"
#include "engine/outbox.h"
#include "engine/requests.h"
#include "engine/resources.h"
#include "engine/variant_slots.h"

namespace deltazip::engine {

// The engine's thread and all that it alone touches. Commands come from the desk, events go to
// the outbox. An error of one request ends that request; an error of a step ends the loop, loudly.
class Loop {
 public:
  Loop(Resources& resources, FrontDesk& desk, Outbox& outbox, LogSink log);
  ~Loop();  // stops and joins
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  void join();         // after FrontDesk::stop()
  void check() const;  // on the engine's thread, or after join()
  void set_prefill_chunk_tokens(std::int32_t num_tokens);  // on the engine's thread

 private:
  using Finish = OutputEvent::Finish;

  // One step, from its plan to its results. There are two: on a device the next is planned and
  // launched while one runs. Memory is kept from step to step.
  struct Step {
    Plan plan;
    StepInput input;
    std::vector<SamplingRow> rows;        // [uses]
    std::vector<SampledToken> samples;    // [uses]
    std::vector<std::size_t> fork_begin;  // [uses + 1], into the next two
    std::vector<SamplingRow> fork_rows;   // first tokens of choices 1, 2, ... of a request
    std::vector<SampledToken> fork_samples;
    bool is_awaited = false;  // the next step cannot be planned or built without its results
    std::unique_ptr<Event> computed;
    std::chrono::steady_clock::time_point begun;
    std::span<const SampledToken> forks_of(std::size_t use) const {
      return std::span(fork_samples)
          .subspan(fork_begin[use], fork_begin[use + 1] - fork_begin[use]);
    }
  };

  // loop.cpp: the thread
  void run() noexcept;
  void turn();
  void wait_for_news();
  void end(const std::string& failure);
  void launch(Step& step);  // it is built; returns when all is queued
  void sample(Step& step, ConstTensorView logits);
  void wait_for(Step& step);  // until it is computed
  void finish(Step& step);    // waits and commits

  // accept.cpp: what comes in
  void accept();
  void handle(Submit& command);
  void handle(Cancel& command);
  void handle(AddVariant& command);
  void handle(RemoveVariant& command);
  void handle(Call& command);
  void finish_loads();
  void forget_drained();
  void start_loads(const Plan& plan);

  // commit.cpp: what goes out
  void note(const Plan& plan);
  void commit(Step& step);
  bool take_token(ChoiceRef choice, const SampledToken& sampled);  // true: it was the last
  void end_choice(ChoiceRef choice);
  void cancel_choice(ChoiceRef choice);
  void end_request(ActiveRequest& request, Finish finish, const std::string& error);
  void set_running(ChoiceRef choice, bool is_running);
  void bury();  // requests that have ended leave the table
  void publish();

  Resources& resources_;
  FrontDesk& desk_;
  Outbox& outbox_;
  const LogSink log_;
  Scheduler scheduler_;
  VariantSlots slots_;
  BatchBuilder builder_;
  std::unique_ptr<Stream> stream_;
  const bool runs_apart_;  // a launch returns before its work is done
  RequestTable requests_;
  std::map<VariantId, std::shared_ptr<VariantRecord>> variants_;  // known to the scheduler
  std::vector<std::shared_ptr<VariantRecord>> draining_;
  std::vector<OutputEvent> events_;   // of this turn
  std::vector<std::int64_t> ended_;   // requests of this turn
  std::vector<std::int64_t> buried_;  // their ids are free once their last events are out
  std::array<Step, 2> steps_;
  Step* under_way_ = nullptr;  // launched and not committed
  std::chrono::steady_clock::time_point last_finish_;
  EngineStats stats_;
  std::mt19937_64 seeds_{std::random_device{}()};
  std::int32_t num_idle_turns_ = 0;  // with work, but nothing to run and nothing to wait for
  bool has_failed_ = false;          // the scheduler's state is not to be trusted
  std::thread thread_;               // last: it uses all of the above
};

}  // namespace deltazip::engine
