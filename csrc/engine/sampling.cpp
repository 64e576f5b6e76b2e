#include "engine/sampling.h"

#include <algorithm>
#include <cmath>

namespace deltazip::engine {
namespace {

void check_range(const char* what, double value, double low, double high) {
  DZ_CHECK(std::isfinite(value) && value >= low && value <= high, what, " must be in [", low, ", ",
           high, "], got ", value);
}

void check_tokens(const char* what, std::int32_t token, std::int32_t vocab_size) {
  DZ_CHECK(token >= 0 && token < vocab_size, what, ": token ", token,
           " is not in the vocabulary of ", vocab_size);
}

}  // namespace

void check_sampling(const SamplingParams& params, std::int32_t vocab_size) {
  constexpr double kMaxPenalty = 100.0;
  constexpr double kMaxCount = 1 << 30;
  check_range("n", params.n, 1, kMaxChoices);
  check_range("temperature", params.temperature, 0.0, 100.0);
  check_range("top_p", params.top_p, 0.0, 1.0);
  DZ_CHECK(params.top_p > 0.0F, "top_p must be above 0, got 0");
  check_range("min_p", params.min_p, 0.0, 1.0);
  check_range("top_k", params.top_k, 0, kMaxCount);
  check_range("repetition_penalty", params.repetition_penalty, 0.01, kMaxPenalty);
  check_range("presence_penalty", params.presence_penalty, -kMaxPenalty, kMaxPenalty);
  check_range("frequency_penalty", params.frequency_penalty, -kMaxPenalty, kMaxPenalty);
  check_range("max_tokens", params.max_tokens, 1, kMaxCount);
  DZ_CHECK(params.min_tokens >= 0 && params.min_tokens <= params.max_tokens,
           "min_tokens must be in [0, max_tokens = ", params.max_tokens, "], got ",
           params.min_tokens);
  check_range("logprobs", params.logprobs, -1, kMaxLogprobs);
  check_range("prompt_logprobs", params.prompt_logprobs, -1, kMaxLogprobs);
  DZ_CHECK(params.stop_token_ids.size() <= kMaxStopTokens, "stop_token_ids: at most ",
           kMaxStopTokens, " tokens, got ", params.stop_token_ids.size());
  for (const std::int32_t token : params.stop_token_ids) {
    check_tokens("stop_token_ids", token, vocab_size);
  }
  DZ_CHECK(params.logit_bias.size() <= static_cast<std::size_t>(vocab_size),
           "logit_bias: at most one for each of the ", vocab_size, " tokens, got ",
           params.logit_bias.size());
  for (const TokenBias& bias : params.logit_bias) {
    check_tokens("logit_bias", bias.token, vocab_size);
    check_range("logit_bias", bias.bias, -1e6, 1e6);
  }
}

bool uses_history(const SamplingParams& params) {
  return params.repetition_penalty != 1.0F || params.presence_penalty != 0.0F ||
         params.frequency_penalty != 0.0F;
}

std::vector<std::int32_t> stop_set(const SamplingParams& params,
                                   std::span<const std::int32_t> eos) {
  std::vector<std::int32_t> tokens = params.stop_token_ids;
  if (!params.ignore_eos) tokens.insert(tokens.end(), eos.begin(), eos.end());
  std::ranges::sort(tokens);
  tokens.erase(std::ranges::unique(tokens).begin(), tokens.end());
  return tokens;
}

Verdict judge(const SamplingParams& params, std::span<const std::int32_t> stop_tokens,
              std::int32_t num_output_before, std::int32_t token) {
  using Finish = OutputEvent::Finish;
  if (num_output_before >= params.min_tokens && std::ranges::binary_search(stop_tokens, token)) {
    return {Finish::kStop, false};
  }
  return {num_output_before + 1 >= params.max_tokens ? Finish::kLength : Finish::kNone, true};
}

SamplingRow sampling_row(const SamplingParams& params, std::uint64_t seed,
                         std::span<const std::int32_t> stop_tokens,
                         std::span<const std::int32_t> tokens, std::size_t num_prompt_tokens) {
  const auto prompt = tokens.first(num_prompt_tokens);
  const auto output = tokens.subspan(num_prompt_tokens);
  SamplingRow row;
  row.temperature = params.temperature;
  row.top_k = params.top_k;
  row.top_p = params.top_p;
  row.min_p = params.min_p;
  row.repetition_penalty = params.repetition_penalty;
  row.presence_penalty = params.presence_penalty;
  row.frequency_penalty = params.frequency_penalty;
  row.seed = seed;
  row.position = tokens.size();
  row.prompt_tokens = prompt.data();
  row.num_prompt_tokens = static_cast<std::int32_t>(prompt.size());
  row.output_tokens = output.data();
  row.num_output_tokens = static_cast<std::int32_t>(output.size());
  row.biases = params.logit_bias.data();
  row.num_biases = static_cast<std::int32_t>(params.logit_bias.size());
  if (row.num_output_tokens < params.min_tokens) {
    row.banned_tokens = stop_tokens.data();
    row.num_banned_tokens = static_cast<std::int32_t>(stop_tokens.size());
  }
  row.num_logprobs = params.logprobs;
  return row;
}

SamplingRow scoring_row(std::int32_t token, std::int32_t num_logprobs) {
  SamplingRow row;
  row.temperature = 0.0F;
  row.forced_token = token;
  row.num_logprobs = num_logprobs;
  return row;
}

TokenLogprobs to_logprobs(const SampledToken& sampled) {
  TokenLogprobs result{sampled.token, sampled.logprob, sampled.rank, {}};
  const auto num_top = static_cast<std::size_t>(sampled.num_top);
  result.top.reserve(num_top);
  for (std::size_t i = 0; i < num_top; ++i) {
    result.top.emplace_back(sampled.top_tokens[i], sampled.top_logprobs[i]);
  }
  return result;
}

}  // namespace deltazip::engine
