#include "backend/cpu/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "backend/sampling_rules.h"

namespace deltazip::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::size_t at(std::int32_t token) { return static_cast<std::size_t>(token); }

void change_logits(const SamplingRow& row, SamplerScratch& scratch) {
  std::vector<float>& logits = scratch.logits;
  if (row.repetition_penalty != 1.0F) {
    constexpr std::uint32_t kSeen = 1;
    scratch.counts.assign(logits.size(), 0);
    const auto penalise = [&](std::int32_t token) {
      if (std::exchange(scratch.counts[at(token)], kSeen) == kSeen) return;
      float& logit = logits[at(token)];
      logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    };
    std::for_each_n(row.prompt_tokens, row.num_prompt_tokens, penalise);
    std::for_each_n(row.output_tokens, row.num_output_tokens, penalise);
  }
  if (has_output_penalty(row)) {
    scratch.counts.assign(logits.size(), 0);
    std::for_each_n(row.output_tokens, row.num_output_tokens,
                    [&](std::int32_t token) { ++scratch.counts[at(token)]; });
    std::for_each_n(row.output_tokens, row.num_output_tokens, [&](std::int32_t token) {
      const std::uint32_t count = std::exchange(scratch.counts[at(token)], 0);
      if (count == 0) return;
      logits[at(token)] -= row.presence_penalty + row.frequency_penalty * static_cast<float>(count);
    });
  }
  for (std::int32_t i = 0; i < row.num_biases; ++i) {
    logits[at(row.biases[i].token)] += row.biases[i].bias;
  }
  for (std::int32_t i = 0; i < row.num_banned_tokens; ++i) {
    logits[at(row.banned_tokens[i])] = -kInfinity;
  }
}

double mass_of(const SamplerScratch& scratch) {
  double mass = 0.0;
  for (const std::int32_t token : scratch.candidates) {
    mass += static_cast<double>(scratch.weights[at(token)]);
  }
  return mass;
}

// Weights in (0, 1] by exponent and four bits of mantissa, the largest in bucket 0.
constexpr std::uint32_t kNumBuckets = 1024;
std::uint32_t bucket_of(float weight) {
  constexpr std::uint32_t kOne = std::bit_cast<std::uint32_t>(1.0F) >> 19;
  return std::min(kOne - (std::bit_cast<std::uint32_t>(weight) >> 19), kNumBuckets - 1);
}

// The fewest candidates whose mass reaches `bound`, most likely first. Only the bucket in which
// the bound falls is sorted: a flat row has tens of thousands of candidates.
void keep_mass(double bound, SamplerScratch& scratch) {
  const std::vector<float>& weights = scratch.weights;
  std::vector<std::int32_t>& candidates = scratch.candidates;
  scratch.bucket_mass.assign(kNumBuckets, 0.0);
  for (const std::int32_t token : candidates) {
    scratch.bucket_mass[bucket_of(weights[at(token)])] += static_cast<double>(weights[at(token)]);
  }
  double mass = 0.0;
  std::uint32_t crossing = 0;
  while (crossing + 1 < kNumBuckets && mass + scratch.bucket_mass[crossing] < bound) {
    mass += scratch.bucket_mass[crossing++];
  }
  const auto middle = std::stable_partition(
      candidates.begin(), candidates.end(),
      [&](std::int32_t token) { return bucket_of(weights[at(token)]) < crossing; });
  const auto end = std::stable_partition(middle, candidates.end(), [&](std::int32_t token) {
    return bucket_of(weights[at(token)]) == crossing;
  });
  std::sort(middle, end, [&](std::int32_t a, std::int32_t b) {
    return weights[at(a)] != weights[at(b)] ? weights[at(a)] > weights[at(b)] : a < b;
  });
  auto kept = middle;
  while (kept != end && (kept == candidates.begin() || mass < bound)) {
    mass += static_cast<double>(weights[at(*kept++)]);
  }
  // Back in token order: a draw follows from which tokens are kept, not from how they were found.
  std::sort(middle, kept);
  std::inplace_merge(candidates.begin(), middle, kept);
  candidates.erase(kept, candidates.end());
}

// The tokens that min-p, top-k and top-p leave, in that order of filters.
void keep_candidates(const Kernels& kernels, const SamplingRow& row, double total,
                     SamplerScratch& scratch) {
  const std::vector<float>& weights = scratch.weights;
  std::vector<std::int32_t>& candidates = scratch.candidates;
  const auto vocab_size = static_cast<std::int64_t>(weights.size());
  const bool has_top_k = row.top_k > 0 && row.top_k < vocab_size;
  const bool is_whole = !has_top_k && row.min_p <= 0.0F;
  // Weights are relative to the largest, so min-p is a bound as it stands.
  const float lowest = row.min_p > 0.0F ? std::nextafter(row.min_p, 0.0F) : 0.0F;

  // No more than needed are gathered: a peaked row has a few hundred of any weight.
  for (const float bound : {1e-2F, 1e-4F, 1e-6F, 0.0F}) {
    candidates.resize(weights.size());
    const std::int64_t count = kernels.collect_greater(candidates.data(), weights.data(),
                                                       vocab_size, std::max(bound, lowest));
    candidates.resize(static_cast<std::size_t>(count));
    if (bound <= lowest) break;
    if (has_top_k && count >= row.top_k) break;
    if (is_whole && mass_of(scratch) >= static_cast<double>(row.top_p) * total) break;
  }
  if (has_top_k && at(row.top_k) < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + row.top_k, candidates.end(),
                     [&](std::int32_t a, std::int32_t b) {
                       return weights[at(a)] != weights[at(b)] ? weights[at(a)] > weights[at(b)]
                                                               : a < b;
                     });
    candidates.resize(at(row.top_k));
    std::sort(candidates.begin(), candidates.end());  // nth_element promises no order
  }
  if (row.top_p < 1.0F) {
    const double kept_total = is_whole ? total : mass_of(scratch);
    keep_mass(static_cast<double>(row.top_p) * kept_total, scratch);
  }
}

std::int32_t draw(const Kernels& kernels, const SamplingRow& row, float max,
                  const std::vector<float>& logits, SamplerScratch& scratch) {
  const auto vocab_size = static_cast<std::int64_t>(logits.size());
  scratch.weights.resize(logits.size());
  const double total = kernels.exp_scaled(scratch.weights.data(), logits.data(), vocab_size, max,
                                          1.0F / row.temperature);
  const double u = uniform_draw(row.seed, row.position);
  const std::vector<float>& weights = scratch.weights;
  const bool keeps_all =
      (row.top_k <= 0 || row.top_k >= vocab_size) && row.top_p >= 1.0F && row.min_p <= 0.0F;
  if (keeps_all) {
    double mass = 0.0;
    std::int32_t last = 0;
    for (std::int32_t token = 0; token < vocab_size; ++token) {
      if (weights[at(token)] <= 0.0F) continue;
      mass += static_cast<double>(weights[at(token)]);
      last = token;
      if (mass > u * total) return token;
    }
    return last;  // rounding left the end of the interval uncovered
  }
  keep_candidates(kernels, row, total, scratch);
  const double kept_total = mass_of(scratch);
  double mass = 0.0;
  for (const std::int32_t token : scratch.candidates) {
    mass += static_cast<double>(weights[at(token)]);
    if (mass > u * kept_total) return token;
  }
  return scratch.candidates.back();
}

void score(const Kernels& kernels, const float* logits, std::int64_t vocab_size,
           const SamplingRow& row, const LogitSummary& summary, SamplerScratch& scratch,
           SampledToken& out) {
  const double sum = kernels.exp_scaled(nullptr, logits, vocab_size, summary.max, 1.0F);
  const double log_sum = static_cast<double>(summary.max) + std::log(sum);
  const auto logprob = [&](std::int32_t token) {
    return static_cast<float>(static_cast<double>(logits[token]) - log_sum);
  };
  out.logprob = logprob(out.token);
  out.rank =
      1 + static_cast<std::int32_t>(kernels.count_greater(logits, vocab_size, logits[out.token]));
  if (row.num_logprobs <= 0) return;

  std::vector<std::int32_t>& candidates = scratch.candidates;
  candidates.resize(static_cast<std::size_t>(vocab_size));
  std::int64_t count = 0;
  for (float width = 4.0F;; width *= 4.0F) {
    const float bound = width < 1e6F ? summary.max - width : -kInfinity;
    count = kernels.collect_greater(candidates.data(), logits, vocab_size, bound);
    if (count >= row.num_logprobs || bound == -kInfinity) break;
  }
  candidates.resize(static_cast<std::size_t>(count));
  out.num_top = static_cast<std::int32_t>(std::min<std::int64_t>(row.num_logprobs, count));
  std::partial_sort(candidates.begin(), candidates.begin() + out.num_top, candidates.end(),
                    [&](std::int32_t a, std::int32_t b) {
                      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
                    });
  for (std::int32_t i = 0; i < out.num_top; ++i) {
    out.top_tokens[i] = candidates[at(i)];
    out.top_logprobs[i] = logprob(candidates[at(i)]);
  }
}

}  // namespace

SampledToken sample_row(const Kernels& kernels, const float* logits, std::int64_t vocab_size,
                        const SamplingRow& row, SamplerScratch& scratch) {
  SampledToken out;
  const LogitSummary summary = kernels.summarise_logits(logits, vocab_size);
  if (!summary.is_finite) {
    out.is_finite = false;
    return out;
  }
  if (row.forced_token >= 0) {
    out.token = row.forced_token;
  } else {
    const bool is_copied = changes_logits(row) || !is_greedy(row);
    const float* values = logits;
    if (is_copied) {
      scratch.logits.assign(logits, logits + vocab_size);
      change_logits(row, scratch);
      values = scratch.logits.data();
    }
    const std::int64_t best = kernels.argmax(values, vocab_size);
    const float max = values[best];
    if (!std::isfinite(max)) {  // every token is banned: no choice is left
      out.is_finite = false;
      return out;
    }
    out.token = is_greedy(row) ? static_cast<std::int32_t>(best)
                               : draw(kernels, row, max, scratch.logits, scratch);
  }
  if (row.num_logprobs >= 0) score(kernels, logits, vocab_size, row, summary, scratch, out);
  return out;
}

}  // namespace deltazip::cpu
