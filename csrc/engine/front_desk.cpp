#include "engine/front_desk.h"

#include <utility>

namespace deltazip::engine {

FrontDesk::FrontDesk(std::shared_ptr<VariantRecord> base, std::int32_t max_waiting)
    : base_(std::move(base)), max_waiting_(max_waiting) {
  check_variant_name(base_->name);
}

void FrontDesk::check_open() const {
  if (stats_.is_alive && !stop_requested_) return;
  detail::fail<InternalError>("the engine has stopped: ",
                              stats_.failure.empty() ? "it was shut down" : stats_.failure);
}

void FrontDesk::put(Command command) {
  if (!is_busy_) last_progress_ = Clock::now();
  is_busy_ = true;
  num_submits_ += std::holds_alternative<Submit>(command) ? 1 : 0;
  inbox_.push_back(std::move(command));
  news_.notify_all();
}

void FrontDesk::reserve(const std::string& name) {
  check_variant_name(name);
  const std::lock_guard lock(mutex_);
  check_open();
  DZ_CHECK(name != base_->name, "variant '", name, "': that is the base's name");
  DZ_CHECK(!reserved_.contains(name), "variant '", name, "' is being added already");
  const auto found = variants_.find(name);
  DZ_CHECK(found == variants_.end(), "variant '", name, "' is ",
           found->second->is_draining ? "still draining; add it again when it is gone"
                                      : "already there; remove it first");
  reserved_.insert(name);
}

void FrontDesk::release(const std::string& name) {
  const std::lock_guard lock(mutex_);
  reserved_.erase(name);
}

void FrontDesk::advertise(std::shared_ptr<VariantRecord> variant) {
  const std::lock_guard lock(mutex_);
  check_open();
  reserved_.erase(variant->name);
  variants_[variant->name] = variant;
  put(AddVariant{std::move(variant)});
}

void FrontDesk::retire(const std::string& name) {
  const std::lock_guard lock(mutex_);
  check_open();
  DZ_CHECK(name != base_->name, "variant '", name, "' is the base, which cannot be removed");
  const auto found = variants_.find(name);
  if (found == variants_.end()) detail::fail<NotFound>("unknown variant '", name, "'");
  if (found->second->is_draining.exchange(true)) return;
  put(RemoveVariant{found->second});
}

bool FrontDesk::is_draining(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  const auto found = variants_.find(name);
  return found != variants_.end() && found->second->is_draining;
}

std::vector<VariantInfo> FrontDesk::variants() const {
  const std::lock_guard lock(mutex_);
  std::vector<VariantInfo> infos{base_->info()};
  for (const auto& [name, variant] : variants_) infos.push_back(variant->info());
  return infos;
}

std::shared_ptr<VariantRecord> FrontDesk::find(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  if (name.empty() || name == base_->name) return base_;
  const auto found = variants_.find(name);
  if (found == variants_.end()) detail::fail<NotFound>("unknown variant '", name, "'");
  if (found->second->is_draining) {
    detail::fail<NotFound>("variant '", name, "' is being removed");
  }
  return found->second;
}

void FrontDesk::submit(Request request) {
  auto variant = find(request.variant);
  const std::lock_guard lock(mutex_);
  check_open();
  if (variant->is_draining) {
    detail::fail<NotFound>("variant '", variant->name, "' is being removed");
  }
  DZ_CHECK(!alive_.contains(request.id), "request id ", request.id, " is in use");
  if (stats_.scheduler.num_waiting + num_taken_ + num_submits_ >= max_waiting_) {
    detail::fail<ResourceExhausted>("the queue is full: ", max_waiting_, " requests wait");
  }
  alive_.emplace(request.id, Alive{request.sampling.n, {}});
  put(Submit{std::move(request), std::move(variant)});
}

void FrontDesk::cancel(std::int64_t request_id, std::int32_t choice) {
  const std::lock_guard lock(mutex_);
  const auto found = alive_.find(request_id);
  if (found == alive_.end()) return;
  Alive& request = found->second;
  DZ_CHECK(choice < request.num_choices, "request ", request_id, " has ", request.num_choices,
           " choices, asked to cancel number ", choice);
  if (request.cancelled.contains(kAllChoices)) return;
  if (request.cancelled.insert(choice).second) put(Cancel{request_id, choice});
}

bool FrontDesk::call(std::function<void()> function) {
  auto done = std::make_shared<std::promise<void>>();
  auto answer = done->get_future();
  {
    const std::lock_guard lock(mutex_);
    if (!stats_.is_alive) return false;
    put(Call{std::move(function), std::move(done)});
  }
  try {
    answer.get();
  } catch (const std::future_error&) {
    return false;  // the engine stopped before it came to this command
  }
  return true;
}

EngineStats FrontDesk::stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats stats = stats_;
  if (is_busy_ || !stats.is_alive) {
    stats.seconds_since_progress =
        std::chrono::duration<double>(Clock::now() - last_progress_).count();
  }
  return stats;
}

void FrontDesk::stop() {
  const std::lock_guard lock(mutex_);
  stop_requested_ = true;
  news_.notify_all();
}

void FrontDesk::wait(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  news_.wait_for(lock, timeout, [&] { return !inbox_.empty() || stop_requested_; });
}

std::deque<Command> FrontDesk::take() {
  const std::lock_guard lock(mutex_);
  num_taken_ += std::exchange(num_submits_, 0);
  return std::exchange(inbox_, {});
}

bool FrontDesk::stop_requested() const {
  const std::lock_guard lock(mutex_);
  return stop_requested_;
}

void FrontDesk::progress() {
  const std::lock_guard lock(mutex_);
  last_progress_ = Clock::now();
}

void FrontDesk::publish(const EngineStats& now, bool has_work) {
  const std::lock_guard lock(mutex_);
  stats_ = now;
  num_taken_ = 0;
  is_busy_ = has_work || !inbox_.empty();
}

void FrontDesk::forget(std::int64_t request_id) {
  const std::lock_guard lock(mutex_);
  alive_.erase(request_id);
}

void FrontDesk::erase(const VariantRecord& variant) {
  const std::lock_guard lock(mutex_);
  variants_.erase(variant.name);
}

std::deque<Command> FrontDesk::close(const std::string& failure) {
  const std::lock_guard lock(mutex_);
  stats_.is_alive = false;
  stats_.failure = failure;
  alive_.clear();
  num_submits_ = 0;
  return std::exchange(inbox_, {});
}

}  // namespace deltazip::engine
