#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/variant_record.h"

namespace deltazip::engine {

inline constexpr SequenceId kNoSequence = -1;

// One choice of a request. It has a sequence in the scheduler from its first token on (choice 0:
// from the start) until it is done.
struct Choice {
  SequenceId sequence = kNoSequence;
  std::int32_t num_output = 0;
  std::int32_t sampled_row = -1;  // of the last step that sampled it
  bool is_running = false;        // in a batch since its last preemption
  bool is_done = false;
  bool is_unwanted = false;  // cancelled; before its first token, it ends with that
};

struct ActiveRequest {
  Request request;
  std::shared_ptr<VariantRecord> variant;
  std::uint64_t seed = 0;  // of choice 0
  std::vector<std::int32_t> stop_tokens;
  std::vector<Choice> choices;                                // request.sampling.n of them
  std::int32_t num_open = 0;                                  // choices not done
  std::int32_t num_cached_prompt_tokens = -1;                 // -1: not scheduled yet
  std::vector<std::optional<TokenLogprobs>> prompt_logprobs;  // [prompt], when asked for

  std::int32_t prompt_length() const { return static_cast<std::int32_t>(request.prompt.size()); }
  bool wants_prompt_logprobs() const { return request.sampling.prompt_logprobs >= 0; }
};

struct ChoiceRef {
  ActiveRequest* request = nullptr;
  std::int32_t index = 0;

  Choice& choice() const { return request->choices[static_cast<std::size_t>(index)]; }
  std::uint64_t seed() const { return request->seed + static_cast<std::uint64_t>(index); }
};

// The requests alive in the engine, by id and by sequence. Engine thread.
class RequestTable {
 public:
  // `fallback_seed` serves requests that bring none.
  ActiveRequest& add(Request request, std::shared_ptr<VariantRecord> variant,
                     std::uint64_t fallback_seed);
  void erase(std::int64_t request_id);  // all choices are done
  ActiveRequest* find(std::int64_t request_id);

  SequenceId open_sequence(ChoiceRef choice);       // a new id
  void close_sequence(ChoiceRef choice);            // its id is forgotten
  ChoiceRef at(SequenceId sequence) const;          // throws InternalError: unknown
  ActiveRequest* owner(SequenceId sequence) const;  // nullptr: unknown
  bool has(SequenceId sequence) const { return owner(sequence) != nullptr; }

  bool empty() const { return requests_.empty(); }
  std::vector<ActiveRequest*> all();
  void check() const;

 private:
  std::map<std::int64_t, std::unique_ptr<ActiveRequest>> requests_;
  std::unordered_map<SequenceId, ChoiceRef> sequences_;
  SequenceId next_sequence_ = 0;
};

}  // namespace deltazip::engine
