#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "deltazip/backend/backend.h"
#include "deltazip/backend/params.h"
#include "deltazip/base/log.h"
#include "deltazip/schedule/scheduler.h"

namespace deltazip {

struct EngineConfig {
  std::string base;       // Hugging Face folder
  std::string base_name;  // what requests call the base; empty: the folder's name
  std::string device = "cpu";
  std::int32_t num_threads = 0;
  std::string dtype = "auto";  // of activations and base weights on a device: float16, bfloat16;
                               // auto: the checkpoint's, or bfloat16. The CPU computes in float32
  std::string kv_dtype = "auto";    // auto: that of the activations
  std::int64_t kv_cache_bytes = 0;  // 0: what is left of the budget; on a CPU at most 4 GiB, or one
                                    // sequence of max_model_len
  std::int64_t memory_budget_bytes = 0;  // weights + scratch + slots + KV; 0: 80 % of free memory,
                                         // 92 % of a device's
  std::int64_t delta_budget_bytes = 0;   // slots; 0: room for num_delta_slots 4-bit variants, at
                                         // most half of what is left
  std::int64_t host_budget_bytes = 0;    // tiled deltas kept in host memory; 0: no bound, beside a
                                         // device half of free host memory, which it pins
  std::int32_t num_delta_slots = 0;      // 0: 8 on a CPU, 64 on a device
  std::int32_t block_size = 16;
  std::int32_t max_batch_tokens = 0;        // 0: 512 on a CPU, 8192 on a device
  std::int32_t max_batch_sequences = 0;     // 0: 64 on a CPU, 256 on a device
  std::int32_t max_variants_per_batch = 0;  // 0: 8 on a CPU, 64 on a device
  std::int32_t prefill_chunk_tokens = 0;    // prompt rows of a step that also decodes; 0: no limit
  std::int32_t max_waiting = 4096;
  std::int32_t max_model_len = 0;  // 0: the model's own
  std::int32_t max_variant_wait_steps = 64;
  bool prefix_caching = true;
  bool warm_up = true;  // a device makes, measures and records at start what its steps will use
};

struct SamplingParams {
  std::int32_t n = 1;
  float temperature = 1.0F, top_p = 1.0F, min_p = 0.0F;
  std::int32_t top_k = 0;
  float repetition_penalty = 1.0F, presence_penalty = 0.0F, frequency_penalty = 0.0F;
  std::optional<std::uint64_t> seed;  // choice i draws from seed + i; none: a fresh one
  std::vector<TokenBias> logit_bias;
  std::vector<std::int32_t> stop_token_ids;  // end the output; not part of it
  bool ignore_eos = false;
  std::int32_t min_tokens = 0, max_tokens = 16;
  std::int32_t logprobs = -1;  // -1: none; k: chosen + k alternatives
  std::int32_t prompt_logprobs = -1;
};

struct Request {
  std::int64_t id = 0;  // chosen by the caller, unique among those alive
  std::string variant;  // "" or the base's name: the base
  std::vector<std::int32_t> prompt;
  SamplingParams sampling;
  std::int32_t priority = 0;
  std::string cache_salt;  // requests share prefix-cache blocks only under equal salts
};

struct TokenLogprobs {
  std::int32_t token = -1;
  float logprob = 0.0F;
  std::int32_t rank = 0;
  std::vector<std::pair<std::int32_t, float>> top;
};

// What comes out, in order per request.
struct OutputEvent {
  enum class Finish : std::uint8_t { kNone, kStop, kLength, kCancelled, kError };
  std::int64_t request_id = 0;
  std::int32_t choice = 0;
  std::vector<std::int32_t> tokens;                           // new ones, zero or more
  std::vector<TokenLogprobs> logprobs;                        // one per token, when asked for
  std::vector<std::optional<TokenLogprobs>> prompt_logprobs;  // once, with the first event
  Finish finish = Finish::kNone;
  std::int32_t stop_token = -1;  // the token that stopped it
  std::string error;
  std::int32_t num_cached_prompt_tokens = 0;  // with the first event
};

struct VariantInfo {
  std::string name;
  std::string path;
  std::string parent;          // the base's name; empty for the base
  std::string content_digest;  // hex: its revision
  std::string state;           // "resident" | "loading" | "host" | "disk" | "draining"
  std::int64_t file_bytes = 0, device_bytes = 0;
  std::int64_t num_requests = 0, num_running = 0, num_waiting = 0, num_prompt_tokens = 0,
               num_output_tokens = 0, num_loads = 0, num_evictions = 0;
  double load_seconds = 0.0;  // of the last load
  std::string manifest_json;
};

struct CapacityRow {
  std::string what;  // "base weights", "scratch", "delta slots", "KV cache", "left"
  std::int64_t bytes;
  std::string detail;  // "2,048 blocks of 16 tokens"
};

struct EngineStats {
  SchedulerStats scheduler;
  std::int64_t num_steps = 0, num_prompt_tokens = 0, num_output_tokens = 0, num_requests = 0,
               num_finished = 0, num_cancelled = 0, num_errors = 0;
  double seconds_since_progress = 0.0;  // of the last finished step, or 0 with nothing to do
  double last_step_seconds = 0.0;
  bool is_alive = true;
  std::string failure;  // why the loop ended, if it did
};

// The one public face of the core. One thread inside owns everything that moves; every method may
// be called from any thread and only passes messages, or waits where it says so.
class Engine {
 public:
  explicit Engine(const EngineConfig& config, const LogSink& log = log_to_stderr);
  // On a device that the caller made; `config.device` only names it.
  Engine(const EngineConfig& config, const LogSink& log, std::unique_ptr<Backend> backend);
  ~Engine();  // cancels what is left

  // Validates fully, then advertises. Waits; throws InvalidArgument with nothing changed.
  // `name` must be new. The delta may stay cold until its first request.
  VariantInfo add_variant(const std::string& name, const std::string& path);
  // From now on NotFound for new requests; running ones finish. Returns at once.
  void remove_variant(const std::string& name);
  bool is_draining(const std::string& name) const;  // false once it is gone
  std::vector<VariantInfo> variants() const;        // the base first

  // Throws NotFound, InvalidArgument (limits), ResourceExhausted (queue full).
  void submit(Request request);
  void cancel(std::int64_t request_id);  // unknown ids are ignored
  // Ends one choice while its siblings go on; the last open one ends the request.
  void cancel(std::int64_t request_id, std::int32_t choice);
  // Up to max_events; waits at most timeout_ms for the first. Empty: timed out or closed.
  std::vector<OutputEvent> poll(std::int32_t max_events, std::int32_t timeout_ms);

  EngineStats stats() const;
  std::vector<CapacityRow> capacity() const;
  // As EngineConfig has it, from the next step on. Waits for the end of the step.
  void set_prefill_chunk_tokens(std::int32_t num_tokens);
  // As it started, with every 0 and "auto" resolved.
  const EngineConfig& config() const;
  std::string base_digest() const;
  std::string model_config_json() const;
  std::int32_t vocab_size() const;
  std::string device_description() const;
  void check() const;  // ledgers; waits for the end of the step. For tests

  void shutdown();  // stops the loop after the current step; requests end as cancelled

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltazip
