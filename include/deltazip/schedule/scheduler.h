#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "deltazip/base/digest.h"
#include "deltazip/schedule/types.h"

namespace deltazip {

struct SchedulerConfig {
  std::int32_t num_blocks = 0;
  std::int32_t block_size = 16;         // KV positions of a block
  std::int32_t max_batch_tokens = 512;  // rows of one step, prefill chunks and decodes together
  std::int32_t max_batch_sequences = 64;
  std::int32_t prefill_chunk_tokens = 0;  // prompt rows of a step that also decodes; 0: no limit
  std::int32_t max_batch_logit_rows = 0;  // rows of one step whose logits are wanted; 0: all may be
  std::int32_t max_variants_per_batch = 8;  // distinct deltas in one step
  std::int32_t max_waiting = 4096;          // sequences; one more is refused
  std::int32_t max_model_len = 0;           // prompt + output
  std::int32_t num_delta_slots = 8;
  std::int64_t delta_budget_bytes = 0;
  std::int32_t max_variant_wait_steps = 64;  // then a waiting variant goes before warm ones
  bool prefix_caching = true;
};

// What the scheduler must know of a sequence. Sampling is not its business.
struct SequenceSpec {
  SequenceId id = 0;
  VariantId variant = kBaseVariant;
  std::vector<std::int32_t> prompt;
  std::int32_t max_new_tokens = 0;
  std::int32_t priority = 0;     // lower runs first; ties by arrival
  Digest prefix_root;            // variant content + salt
  bool use_prefix_cache = true;  // false for prompt logprobs: every prompt row must be computed
  bool scores_prompt = false;    // prompt logprobs: every row of it counts as a logit row
};

// One sequence's share of a step: tokens [start, start + num_tokens) are computed.
struct ScheduledChunk {
  SequenceId id = 0;
  VariantId variant = kBaseVariant;
  SlotId slot = kNoSlot;
  std::int32_t start = 0;
  std::int32_t num_tokens = 0;
  bool samples = false;  // the chunk ends at the sequence's last known token
  // The sequence's tokens of this chunk, and its block table; valid until advance() or commit().
  std::span<const std::int32_t> tokens;  // the last may be kUnknownToken
  std::span<const BlockId> blocks;
};

// Stands for a sampled token between advance() and commit().
inline constexpr std::int32_t kUnknownToken = -1;

struct BlockCopy {
  BlockId from, to;  // copy on write, before the step's kernels
};

struct DeltaLoad {
  SlotId slot;
  VariantId variant;
  std::vector<SlotId> evicted;
};

// One step's decision, a value. The engine carries it out and commits it.
struct Plan {
  std::vector<ScheduledChunk> chunks;  // sorted by slot, so that a segment's rows are neighbours
  std::vector<BlockCopy> copies;       // to do in this order
  std::vector<DeltaLoad> loads;        // to start now; asynchronous
  std::vector<SequenceId> preempted;   // blocks given back; recomputed later. For metrics
  std::int32_t num_tokens = 0;
  std::int32_t num_logit_rows = 0;  // at most
  bool empty() const { return chunks.empty(); }
  bool reads(SlotId slot) const;  // some chunk's delta lies there
};

struct SchedulerStats {
  std::int32_t num_waiting = 0, num_running = 0;
  std::int32_t num_blocks = 0, num_free_blocks = 0;
  std::int64_t num_preemptions = 0;
  std::int64_t prefix_hit_tokens = 0, prefix_query_tokens = 0;
};

// Who runs next. Host integers only; one thread. plan() -> the engine runs it -> commit().
class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);
  ~Scheduler();

  // Variants are made known with the bytes their delta takes in a slot (0 for the base).
  void add_variant(VariantId variant, std::int64_t num_bytes);
  // Drain: true when no sequence uses it any more and it is forgotten; call again until true.
  bool try_remove_variant(VariantId variant);
  // Where a variant's delta is, or is being loaded to.
  std::optional<SlotId> slot_of(VariantId variant) const;

  // Throws ResourceExhausted (queue full) or InvalidArgument (too long for the cache or the model).
  void add(SequenceSpec spec);
  // n > 1: `child` continues a copy of `parent`'s tokens; full blocks are shared, the last one is
  // copied on write. Between plan() and commit(), if the parent's chunk samples, the child joins
  // the plan and commit() takes an Outcome for it too: its own first token. Otherwise the parent
  // must have finished its prompt. The child starts running at once.
  void fork(SequenceId parent, SequenceId child);
  void cancel(SequenceId id);  // waiting or running; blocks come back now. Unknown ids are ignored
  bool has(SequenceId id) const;
  bool has_work() const;  // anything waiting or running
  // From the next plan on, as SchedulerConfig has it.
  void set_prefill_chunk_tokens(std::int32_t num_tokens);

  void delta_loaded(SlotId slot);
  // The sequences that waited for it are dropped and named, for the engine to fail.
  std::vector<SequenceId> delta_load_failed(SlotId slot);

  Plan plan();
  // Planning one step ahead: of the plan under way only the tokens are still to come. Counts move
  // on as if each sequence that samples got one and goes on, unless it reaches its length; so the
  // next plan can be made, and may be under way itself when commit() brings the tokens. What ends
  // then was in the next plan for nothing; its outcome there is ignored. Not for a plan whose
  // sequences are to be forked with their first token.
  // What is freed meanwhile may still be read by the plan that was advanced: work on blocks is
  // queued behind, but a load into a slot that it reads must not begin before it has been computed.
  void advance(const Plan& plan);
  struct Outcome {
    SequenceId id;
    std::int32_t token = -1;  // the sampled token, for chunks with samples
    bool finished = false;    // stop, length or error, as the engine judged
  };
  // One Outcome for each chunk that samples; those of cancelled sequences are ignored. Publishes
  // full blocks (not of a sequence that ends without a token), frees finished sequences. Every plan
  // with chunks must be committed, or advanced, before the next one is made; one that was advanced
  // is committed before the next is advanced or committed.
  void commit(const Plan& plan, std::span<const Outcome> outcomes);

  // Prompt and output; the last may be kUnknownToken.
  std::span<const std::int32_t> tokens(SequenceId id) const;
  SchedulerStats stats() const;
  void check() const;  // all ledgers; throws InternalError

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltazip
