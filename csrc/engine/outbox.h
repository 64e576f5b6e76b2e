#pragma once

#include <condition_variable>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "deltazip/engine/engine.h"

namespace deltazip::engine {

// Events on their way out. What a choice has not yet been polled for is merged into one event, so
// a slow reader costs the tokens generated for it and no more. Thread-safe.
class Outbox {
 public:
  void push(std::vector<OutputEvent> events);
  std::vector<OutputEvent> poll(std::int32_t max_events, std::int32_t timeout_ms);
  void close();  // poll() hands out what is left and then no longer waits
  std::size_t size() const;

 private:
  using Key = std::pair<std::int64_t, std::int32_t>;  // request, choice

  mutable std::mutex mutex_;
  std::condition_variable news_;
  std::list<OutputEvent> ready_;                          // oldest first
  std::map<Key, std::list<OutputEvent>::iterator> open_;  // those that may still be merged into
  bool is_closed_ = false;
};

}  // namespace deltazip::engine
