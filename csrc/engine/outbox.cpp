#include "engine/outbox.h"

#include <algorithm>
#include <chrono>
#include <iterator>

namespace deltazip::engine {
namespace {

template <typename T>
void append(std::vector<T>& to, std::vector<T>& from) {
  if (to.empty()) {
    to = std::move(from);
  } else {
    to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
  }
}

void merge(OutputEvent& to, OutputEvent& from) {
  append(to.tokens, from.tokens);
  append(to.logprobs, from.logprobs);
  append(to.prompt_logprobs, from.prompt_logprobs);
  to.finish = from.finish;
  to.stop_token = from.stop_token;
  to.error = std::move(from.error);
  to.num_cached_prompt_tokens =
      std::max(to.num_cached_prompt_tokens, from.num_cached_prompt_tokens);
}

}  // namespace

void Outbox::push(std::vector<OutputEvent> events) {
  if (events.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    for (OutputEvent& event : events) {
      const Key key{event.request_id, event.choice};
      const bool is_last = event.finish != OutputEvent::Finish::kNone;
      auto open = open_.find(key);
      if (open != open_.end()) {
        merge(*open->second, event);
      } else {
        ready_.push_back(std::move(event));
        open = open_.emplace(key, std::prev(ready_.end())).first;
      }
      // A finished event is never merged into: its request's id may be used again.
      if (is_last) open_.erase(open);
    }
  }
  news_.notify_all();
}

std::vector<OutputEvent> Outbox::poll(std::int32_t max_events, std::int32_t timeout_ms) {
  std::vector<OutputEvent> events;
  std::unique_lock lock(mutex_);
  news_.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                 [&] { return !ready_.empty() || is_closed_; });
  while (!ready_.empty() && static_cast<std::int64_t>(events.size()) < max_events) {
    OutputEvent& event = ready_.front();
    const auto open = open_.find({event.request_id, event.choice});
    if (open != open_.end() && open->second == ready_.begin()) open_.erase(open);
    events.push_back(std::move(event));
    ready_.pop_front();
  }
  return events;
}

void Outbox::close() {
  {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
  }
  news_.notify_all();
}

std::size_t Outbox::size() const {
  const std::lock_guard lock(mutex_);
  return ready_.size();
}

}  // namespace deltazip::engine
