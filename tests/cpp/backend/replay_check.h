#pragma once

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "backend/wrapped_backend.h"

namespace deltazip::test {

// A device that would replay steps: pads decode steps to multiples of four, and holds every step
// of a key to the launches of the first one. The arithmetic is the CPU's.
class ReplayCheck : public WrappedBackend {
 public:
  explicit ReplayCheck(const BackendOptions& options = {})
      : WrappedBackend(make_backend("cpu", options)) {
    wrapped_ops().on_op = [this](const std::string& launch) {
      if (is_in_step_) launches_.push_back(launch);
    };
  }

  std::int32_t padded_rows(std::int32_t num_rows) const override {
    return num_rows > kMostPadded ? 0 : (num_rows + 3) / 4 * 4;
  }
  void run_step(const StepKey& key, Stream&, const std::function<void()>& body) override {
    ++num_steps;
    launches_.clear();
    is_in_step_ = true;
    body();
    is_in_step_ = false;
    const auto [first, is_new] = steps_.emplace(key, launches_);
    if (!is_new) {
      ++num_replays;
      EXPECT_EQ(first->second, launches_) << "a step differs from an earlier one of its key";
    }
  }

  static constexpr std::int32_t kMostPadded = 14;
  int num_steps = 0, num_replays = 0;
  std::size_t num_keys() const { return steps_.size(); }

 private:
  bool is_in_step_ = false;
  std::vector<std::string> launches_;
  std::map<StepKey, std::vector<std::string>> steps_;
};

}  // namespace deltazip::test
