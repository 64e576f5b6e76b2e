#include "engine/memory_plan.h"

#include <algorithm>
#include <limits>
#include <string>

namespace deltazip::engine {
namespace {

std::string mib(std::int64_t bytes) {
  const std::int64_t tenths = bytes / 1024 * 10 / 1024;
  return detail::concat(tenths / 10, ".", tenths % 10, " MiB");
}

// Where weights and scratch are too much already.
std::string what_fits(const EngineConfig& config, const MemoryNeeds& needs) {
  const std::int64_t per_token = std::max<std::int64_t>(needs.scratch / config.max_batch_tokens, 1);
  const std::int64_t num_tokens = (config.memory_budget_bytes - needs.weights) / 2 / per_token;
  if (num_tokens < 1) return "raise memory_budget_bytes, or take a smaller base or a larger device";
  return detail::concat("raise memory_budget_bytes or lower max_batch_tokens: ", num_tokens,
                        " would leave as much for deltas and the KV cache");
}

// Of free memory. The rest is for what a backend takes later, and on a host for everybody else.
std::int64_t usable(std::int64_t free_memory, bool shares_host_memory) {
  return free_memory / 100 * (shares_host_memory ? 80 : 92);
}

}  // namespace

EngineConfig resolve_batch_sizes(const EngineConfig& config, bool shares_host_memory) {
  EngineConfig resolved = config;
  const auto resolve = [&](std::int32_t& value, std::int32_t on_host, std::int32_t on_device) {
    if (value == 0) value = shares_host_memory ? on_host : on_device;
  };
  resolve(resolved.max_batch_tokens, 512, 8192);
  resolve(resolved.max_batch_sequences, 64, 256);
  resolve(resolved.max_variants_per_batch, 8, 64);
  resolve(resolved.num_delta_slots, 8, 64);
  return resolved;
}

std::int32_t max_logit_rows(const EngineConfig& config) {
  return std::min(config.max_batch_tokens, std::max(kMaxLogitRows, config.max_batch_sequences));
}

MemoryPlan plan_memory(const EngineConfig& config, const MemoryNeeds& needs) {
  MemoryPlan plan{config, 0, {}};
  EngineConfig& resolved = plan.config;
  if (resolved.memory_budget_bytes == 0) {
    resolved.memory_budget_bytes = usable(needs.free_memory, needs.shares_host_memory);
  }

  std::int64_t left = resolved.memory_budget_bytes - needs.weights - needs.scratch;
  DZ_CHECK(left > 0, "the memory budget is ", mib(resolved.memory_budget_bytes), " of ",
           mib(needs.free_memory), " free, but the base's weights take ", mib(needs.weights),
           " and scratch for ", resolved.max_batch_tokens, " tokens ", mib(needs.scratch), "; ",
           what_fits(resolved, needs));

  if (resolved.delta_budget_bytes == 0) {
    const std::int64_t wanted =
        std::max(needs.typical_delta * resolved.num_delta_slots, needs.largest_delta);
    resolved.delta_budget_bytes = std::min(wanted, left / 2);
  }
  left -= resolved.delta_budget_bytes;
  DZ_CHECK(left > 0, "delta_budget_bytes is ", mib(resolved.delta_budget_bytes), ", but only ",
           mib(left + resolved.delta_budget_bytes),
           " of the memory budget are left after weights and scratch");

  if (resolved.max_model_len == 0) resolved.max_model_len = needs.model_max_len;
  const std::int64_t block_size = resolved.block_size;
  const auto bytes_for = [&](std::int64_t num_tokens) {
    return (num_tokens + block_size - 1) / block_size * needs.kv_block;
  };
  if (resolved.kv_cache_bytes == 0) {
    resolved.kv_cache_bytes = left;
    if (needs.shares_host_memory) {
      const std::int64_t enough =
          std::max(kMaxAutomaticHostKvBytes, bytes_for(resolved.max_model_len));
      resolved.kv_cache_bytes = std::min(left, enough);
    }
  }
  DZ_CHECK(resolved.kv_cache_bytes <= left, "kv_cache_bytes is ", mib(resolved.kv_cache_bytes),
           ", but only ", mib(left),
           " of the memory budget are left after weights, scratch and delta slots");

  const std::int64_t num_blocks = std::min<std::int64_t>(resolved.kv_cache_bytes / needs.kv_block,
                                                         std::numeric_limits<std::int32_t>::max());
  const std::int64_t num_tokens = num_blocks * block_size;
  std::string clamped;
  if (num_tokens < resolved.max_model_len && config.max_model_len == 0 && num_blocks > 0) {
    clamped = detail::concat("; max_model_len lowered from ", resolved.max_model_len, " to ",
                             num_tokens, ", what fits");
    resolved.max_model_len = static_cast<std::int32_t>(num_tokens);
  }
  DZ_CHECK(num_tokens >= resolved.max_model_len && num_blocks > 0, "a KV cache of ",
           mib(resolved.kv_cache_bytes), " holds ", num_tokens,
           " tokens, but one sequence of max_model_len = ", resolved.max_model_len, " needs ",
           mib(bytes_for(resolved.max_model_len)),
           "; lower max_model_len or raise kv_cache_bytes or memory_budget_bytes");
  resolved.kv_cache_bytes = num_blocks * needs.kv_block;
  plan.num_blocks = static_cast<std::int32_t>(num_blocks);

  plan.rows = {
      {"base weights", needs.weights, ""},
      {"scratch", needs.scratch,
       detail::concat("activations of ", resolved.max_batch_tokens, " rows, logits of ",
                      needs.max_logit_rows)},
      {"delta slots", resolved.delta_budget_bytes,
       detail::concat(resolved.num_delta_slots, " slots; a 4-bit variant takes about ",
                      mib(needs.typical_delta))},
      {"KV cache", resolved.kv_cache_bytes,
       detail::concat(num_blocks, " blocks of ", block_size, " tokens, ", resolved.kv_dtype,
                      "; a sequence has at most ", resolved.max_model_len, clamped)},
      {"left", left - resolved.kv_cache_bytes,
       detail::concat("of a budget of ", mib(resolved.memory_budget_bytes), "; ",
                      mib(needs.free_memory), " were free")},
  };
  return plan;
}

}  // namespace deltazip::engine
