#pragma once

#include <cstdint>
#include <vector>

#include "deltazip/engine/engine.h"

namespace deltazip::engine {

// What the memory plan is made from. All sizes in bytes.
struct MemoryNeeds {
  std::int64_t free_memory = 0;  // before anything is loaded
  std::int64_t weights = 0, scratch = 0;
  std::int64_t typical_delta = 0;  // what a 4-bit variant takes in a slot
  std::int64_t largest_delta = 0;  // and one with 8 bits for every weight
  std::int64_t kv_block = 0;       // one block, all layers
  std::int32_t model_max_len = 0;
  std::int32_t max_logit_rows = 0;
  bool shares_host_memory = false;
};

struct MemoryPlan {
  EngineConfig config;  // the sizes resolved
  std::int32_t num_blocks = 0;
  std::vector<CapacityRow> rows;
};

// On a device of its own the KV cache takes all that is left. Memory shared with everybody else is
// not hoarded: there an automatic cache stops at this size, or at one longest sequence.
inline constexpr std::int64_t kMaxAutomaticHostKvBytes = std::int64_t{4} << 30;

// The logits of one step have room for so many rows, or for one a sequence if that is more.
inline constexpr std::int32_t kMaxLogitRows = 1024;
std::int32_t max_logit_rows(const EngineConfig& config);

// The sizes of a batch with every 0 resolved: a device has more to do at once.
EngineConfig resolve_batch_sizes(const EngineConfig& config, bool shares_host_memory);

// Shares the budget among weights, scratch, delta slots and KV cache. Throws InvalidArgument when
// it does not hold one sequence of max_model_len, saying what would fit; an automatic
// max_model_len is lowered instead.
MemoryPlan plan_memory(const EngineConfig& config, const MemoryNeeds& needs);

}  // namespace deltazip::engine
