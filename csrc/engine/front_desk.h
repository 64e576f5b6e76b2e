#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "engine/variant_record.h"

namespace deltazip::engine {

struct Submit {
  Request request;
  std::shared_ptr<VariantRecord> variant;
};
inline constexpr std::int32_t kAllChoices = -1;

struct Cancel {
  std::int64_t request_id;
  std::int32_t choice;  // or kAllChoices
};
struct AddVariant {
  std::shared_ptr<VariantRecord> variant;
};
struct RemoveVariant {
  std::shared_ptr<VariantRecord> variant;
};
struct Call {  // runs on the engine's thread, between steps
  std::function<void()> function;
  std::shared_ptr<std::promise<void>> done;
};
using Command = std::variant<Submit, Cancel, AddVariant, RemoveVariant, Call>;

// Where callers and the engine's thread meet: names, admission, the inbox, and what the engine
// last said of itself. Thread-safe; one lock, held for lookups and queue operations only.
//
// A name is looked up and its command queued under one lock, so the inbox's order is the truth: no
// request can follow its variant's removal.
class FrontDesk {
 public:
  FrontDesk(std::shared_ptr<VariantRecord> base, std::int32_t max_waiting);

  // Callers. All but cancel throw InternalError once the engine has stopped.
  void reserve(const std::string& name);  // throws InvalidArgument: a bad name, or one in use
  void release(const std::string& name);  // the reservation, after a failed load
  void advertise(std::shared_ptr<VariantRecord> variant);  // its name was reserved
  void retire(const std::string& name);                    // throws NotFound
  bool is_draining(const std::string& name) const;
  std::vector<VariantInfo> variants() const;                           // the base first
  std::shared_ptr<VariantRecord> find(const std::string& name) const;  // throws NotFound
  void submit(Request request);  // throws NotFound, InvalidArgument, ResourceExhausted
  void cancel(std::int64_t request_id, std::int32_t choice);  // or kAllChoices
  // Waits until `function` has run on the engine's thread, and throws what it threw. False: the
  // engine has stopped and it did not run.
  bool call(std::function<void()> function);
  EngineStats stats() const;
  void stop();

  // The engine's thread.
  void wait(std::chrono::milliseconds timeout);  // for a command or a stop
  std::deque<Command> take();
  bool stop_requested() const;
  void progress();  // a step or a load was finished
  void publish(const EngineStats& now, bool has_work);
  void forget(std::int64_t request_id);  // its id may be used again
  void erase(const VariantRecord& variant);
  // No more commands from now on; returns those never taken.
  std::deque<Command> close(const std::string& failure);

 private:
  using Clock = std::chrono::steady_clock;

  void check_open() const;
  void put(Command command);

  mutable std::mutex mutex_;
  std::condition_variable news_;
  const std::shared_ptr<VariantRecord> base_;
  const std::int32_t max_waiting_;
  std::map<std::string, std::shared_ptr<VariantRecord>> variants_;  // without the base
  std::set<std::string> reserved_;
  struct Alive {
    std::int32_t num_choices = 0;
    std::set<std::int32_t> cancelled;  // choices, kAllChoices too
  };
  std::unordered_map<std::int64_t, Alive> alive_;  // by request id
  std::deque<Command> inbox_;     // bounded: admission, one cancel a choice, one change a variant
  std::int32_t num_submits_ = 0;  // in the inbox
  std::int32_t num_taken_ = 0;    // taken from it, not yet in stats_
  EngineStats stats_;
  bool is_busy_ = false;
  bool stop_requested_ = false;
  Clock::time_point last_progress_ = Clock::now();
};

}  // namespace deltazip::engine
