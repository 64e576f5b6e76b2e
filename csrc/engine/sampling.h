#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "deltazip/engine/engine.h"

namespace deltazip::engine {

inline constexpr std::int32_t kMaxChoices = 128;
inline constexpr std::size_t kMaxStopTokens = 1024;

// Throws InvalidArgument naming the parameter, its range and what came.
void check_sampling(const SamplingParams& params, std::int32_t vocab_size);

// Whether a choice depends on the tokens before it by more than the logits.
bool uses_history(const SamplingParams& params);

// What ends an output: its own stop tokens and, unless ignored, the model's. Sorted.
std::vector<std::int32_t> stop_set(const SamplingParams& params, std::span<const std::int32_t> eos);

// One sampled token judged. A stop token is not part of the output, a last one by length is.
struct Verdict {
  OutputEvent::Finish finish = OutputEvent::Finish::kNone;
  bool is_output = true;
};
Verdict judge(const SamplingParams& params, std::span<const std::int32_t> stop_tokens,
              std::int32_t num_output_before, std::int32_t token);

// `tokens` are prompt then output, `stop_tokens` are banned until min_tokens are out. The result
// points into the arguments.
SamplingRow sampling_row(const SamplingParams& params, std::uint64_t seed,
                         std::span<const std::int32_t> stop_tokens,
                         std::span<const std::int32_t> tokens, std::size_t num_prompt_tokens);
// A row that is only scored: the logprob of `token`, with `num_logprobs` alternatives.
SamplingRow scoring_row(std::int32_t token, std::int32_t num_logprobs);

TokenLogprobs to_logprobs(const SampledToken& sampled);

}  // namespace deltazip::engine
