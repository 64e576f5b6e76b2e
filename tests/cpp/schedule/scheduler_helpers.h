#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "deltazip/schedule/block_allocator.h"
#include "deltazip/schedule/scheduler.h"

namespace deltazip {

inline SchedulerConfig small() {
  SchedulerConfig config;
  config.num_blocks = 32;
  config.block_size = 4;
  config.max_batch_tokens = 16;
  config.max_batch_sequences = 8;
  config.max_variants_per_batch = 2;
  config.max_waiting = 8;
  config.max_model_len = 100;
  config.num_delta_slots = 2;
  config.delta_budget_bytes = 100;
  config.max_variant_wait_steps = 8;
  return config;
}

inline SequenceSpec spec_of(SequenceId id, std::int32_t prompt, std::int32_t max_new,
                            VariantId variant = kBaseVariant, std::int32_t priority = 0) {
  SequenceSpec spec;
  spec.id = id;
  spec.variant = variant;
  for (std::int32_t i = 0; i < prompt; ++i) spec.prompt.push_back(i);
  spec.max_new_tokens = max_new;
  spec.priority = priority;
  spec.prefix_root = sha256(std::as_bytes(std::span(&variant, 1)));
  return spec;
}

// Commits the plan: every sampling sequence gets `token`; those in `finished` end.
inline void commit(Scheduler& scheduler, const Plan& plan,
                   const std::vector<SequenceId>& finished = {}, std::int32_t token = 1) {
  std::vector<Scheduler::Outcome> outcomes;
  for (const ScheduledChunk& chunk : plan.chunks) {
    if (!chunk.samples) continue;
    const bool ends = std::count(finished.begin(), finished.end(), chunk.id) > 0;
    outcomes.push_back({chunk.id, token, ends});
  }
  scheduler.commit(plan, outcomes);
  scheduler.check();
}

inline const ScheduledChunk* chunk_of(const Plan& plan, SequenceId id) {
  for (const ScheduledChunk& chunk : plan.chunks) {
    if (chunk.id == id) return &chunk;
  }
  return nullptr;
}

template <typename E>
std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const E& error) {
    return error.what();
  }
  return "nothing was thrown";
}

}  // namespace deltazip
