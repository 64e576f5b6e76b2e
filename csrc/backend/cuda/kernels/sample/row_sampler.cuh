#pragma once

// One row of logits in the shared memory of a cluster, each CTA holding a run of the vocabulary;
// or in one CTA's scratch.
// Floats become integers for every comparison and every sum, so nothing depends on who adds first.

#include <cfloat>

#include "backend/cuda/kernels/device/vec.cuh"
#include "backend/cuda/kernels/sample/collective.cuh"
#include "backend/cuda/kernels/sample/sample.h"
#include "backend/sampling_rules.h"

namespace deltazip::cuda::sampling {

constexpr u32 kOneBits = 0x3F800000U;  // of 1.0F, the largest weight

// Ascends as the floats do; -0 and +0 are equal.
__device__ __forceinline__ u32 order_key(float value) {
  const u32 bits = __float_as_uint(value + 0.0F);
  return bits ^ ((bits >> 31) != 0 ? ~0U : 0x80000000U);
}
__device__ __forceinline__ float value_of_key(u32 key) {
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000U : ~0U));
}

__device__ __forceinline__ u64 mass_of(float weight) {
  return __float2ull_rn(weight * static_cast<float>(1ULL << kMassBits));
}
__device__ __forceinline__ u64 mass_of_bits(u32 bits) { return mass_of(__uint_as_float(bits)); }

struct Best {
  u32 key;
  std::int32_t token;  // the lowest of equals
};

struct Shared {
  Exchange exchange;
  // On the cluster's first CTA: the alternatives, in no order.
  int num_top;
  u32 top_keys[kMaxLogprobs];
  std::int32_t top_tokens[kMaxLogprobs];
};

template <typename T>
class RowSampler {
 public:
  // keys: [share_of()], counts: [min(share_of(), kMaxCounts)], of shared memory.
  __device__ RowSampler(const SampleLaunch& params, const SamplingRow& row, const T* logits,
                        Cluster& cluster, Shared& shared, u32* keys, u32* counts)
      : row_(row),
        logits_(logits),
        cluster_(cluster),
        shared_(shared),
        vocab_size_(static_cast<int>(params.vocab_size)),
        first_(min(static_cast<int>(cluster.rank()) * share(), vocab_size_)),
        count_(min(share(), vocab_size_ - first_)),
        keys_(keys),
        counts_(counts) {}

  // The largest raw logit. False: there is NaN or +inf, or nothing but -inf. Keeps the logits in
  // shared memory as floats if asked to.
  __device__ bool read_logits(bool keeps, Best& best) {
    u64 bests[2] = {0, 0};
    u32 key = 0;
    int token = 0;
    bool is_bad = false;
    const auto take = [&](int i, float value) {
      is_bad |= !(value <= FLT_MAX);
      const u32 value_key = order_key(value);
      if (value_key > key) {
        key = value_key;
        token = first_ + i;
      }
      if (keeps) keys_[i] = __float_as_uint(value);
    };
    for_logits(take);
    bests[0] = pack(key, token);
    bests[1] = is_bad ? 1 : 0;
    cluster_.reduce<Max>(bests);
    best = unpack(bests[0]);
    return bests[1] == 0 && best.key >= order_key(-FLT_MAX);
  }

  // Penalties, biases and bans on the logits in shared memory.
  __device__ void change_logits() {
    if (uses_history(row_)) {
      const int most = static_cast<int>(kMaxCounts);
      for (int begin = 0; begin < count_; begin += most) penalise(begin, min(most, count_ - begin));
    }
    for (int i = thread(); i < row_.num_biases; i += kThreads) {
      const int token = row_.biases[i].token;
      const bool is_first = i == 0 || row_.biases[i - 1].token != token;
      if (!is_mine(token) || !is_first) continue;
      float value = logit(token - first_);
      for (int j = i; j < row_.num_biases && row_.biases[j].token == token; ++j) {
        value += row_.biases[j].bias;
      }
      keys_[token - first_] = __float_as_uint(value);
    }
    __syncthreads();
    for (int i = thread(); i < row_.num_banned_tokens; i += kThreads) {
      const int token = row_.banned_tokens[i];
      if (is_mine(token)) keys_[token - first_] = __float_as_uint(-INFINITY);
    }
    __syncthreads();
  }

  // The largest changed logit. False: no choice is left.
  __device__ bool find_best(Best& best) {
    u32 key = 0;
    int token = 0;
    for (int i = thread(); i < count_; i += kThreads) {
      const u32 value_key = order_key(logit(i));
      if (value_key > key) {
        key = value_key;
        token = first_ + i;
      }
    }
    u64 packed[1] = {pack(key, token)};
    cluster_.reduce<Max>(packed);
    best = unpack(packed[0]);
    return best.key >= order_key(-FLT_MAX) && best.key <= order_key(FLT_MAX);
  }

  // Draws from exp((logit - max) / temperature) after min-p, top-k and top-p.
  __device__ std::int32_t draw(float max_logit) {
    const bool has_top_k = row_.top_k > 0 && row_.top_k < vocab_size_;
    const float factor = 1.0F / row_.temperature;
    Kept kept{row_.min_p > 0.0F ? __float_as_uint(row_.min_p) : 1U, 0U};
    u64 sums[2] = {0, 0};  // mass and number of those kept
    for (int i = thread(); i < count_; i += kThreads) {
      const u32 bits = __float_as_uint(expf((logit(i) - max_logit) * factor));
      keys_[i] = bits;
      if (bits < kept.bits) continue;
      sums[0] += mass_of_bits(bits);
      ++sums[1];
    }
    cluster_.reduce<Sum>(sums);
    u64 total = sums[0];
    if (has_top_k && sums[1] > static_cast<u64>(row_.top_k)) {
      total = keep_number(static_cast<u64>(row_.top_k), kept);
    }
    if (row_.top_p < 1.0F) total = keep_mass(total, kept);

    const double place = uniform_draw(row_.seed, row_.position) * static_cast<double>(total);
    const u64 need = min(static_cast<u64>(place), total - 1) + 1;
    const auto for_kept = [&](auto body) {
      for (int i = thread(); i < count_; i += kThreads) {
        const u32 bits = keys_[i];
        if (is_kept(kept, bits, i)) body(from_end(i), [&] { return mass_of_bits(bits); });
      }
    };
    const auto found = cluster_.search(0, static_cast<u32>(vocab_size_), need, for_kept);
    return vocab_size_ - 1 - static_cast<int>(found.bound);
  }

  // Log-softmax and rank of `token` among the raw logits, and the most likely alternatives.
  // Written by one CTA.
  __device__ void score(std::int32_t token, const Best& best, SampledToken& out) {
    const float max_logit = value_of_key(best.key), token_logit = to_float(logits_[token]);
    const u32 token_key = order_key(token_logit), lowest = order_key(-INFINITY) + 1;
    u64 sums[3] = {0, 0, 0};  // of exponentials, of those greater than `token`, of those not -inf
    for_logits([&](int i, float value) {
      const u32 key = order_key(value);
      keys_[i] = key;
      sums[0] += mass_of(expf(value - max_logit));
      sums[1] += key > token_key ? 1 : 0;
      sums[2] += key >= lowest ? 1 : 0;
    });
    cluster_.reduce<Sum>(sums);
    const double log_sum =
        static_cast<double>(max_logit) +
        log(static_cast<double>(sums[0]) / static_cast<double>(1ULL << kMassBits));
    const auto logprob = [&](float value) {
      return static_cast<float>(static_cast<double>(value) - log_sum);
    };
    const int num_top = static_cast<int>(min(static_cast<u64>(max(row_.num_logprobs, 0)), sums[2]));
    if (cluster_.rank() == 0 && threadIdx.x == 0) {
      out.logprob = logprob(token_logit);
      out.rank = static_cast<std::int32_t>(sums[1]) + 1;
      out.num_top = num_top;
    }
    if (num_top == 0) return;
    Kept kept{lowest, 0U};
    if (static_cast<u64>(num_top) < sums[2]) {
      const auto found =
          cluster_.search(lowest, best.key + 1, static_cast<u64>(num_top), for_each_counted());
      kept.bits = found.bound;
      limit_ties(static_cast<u64>(num_top) - found.above, kept);
    }
    gather(kept);
    if (cluster_.rank() != 0 || thread() >= num_top) return;
    const u32 key = shared_.top_keys[thread()];
    const int top_token = shared_.top_tokens[thread()];
    int place = 0;
    for (int i = 0; i < num_top; ++i) {
      const u32 other = shared_.top_keys[i];
      place += other > key || (other == key && shared_.top_tokens[i] < top_token) ? 1 : 0;
    }
    out.top_tokens[place] = top_token;
    out.top_logprobs[place] = logprob(value_of_key(key));
  }

 private:
  // Keys greater than `bits`, and of those equal to it the ones at or above `end_bound` (from_end).
  struct Kept {
    u32 bits, end_bound;
  };

  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int share() const {
    return static_cast<int>(share_of(vocab_size_, kRowCtas));
  }
  static __device__ __forceinline__ u64 pack(u32 key, int token) {
    return (static_cast<u64>(key) << 32) | ~static_cast<u32>(token);
  }
  static __device__ __forceinline__ Best unpack(u64 packed) {
    return {static_cast<u32>(packed >> 32), static_cast<std::int32_t>(~static_cast<u32>(packed))};
  }
  __device__ __forceinline__ bool is_mine(int token) const {
    return static_cast<u32>(token - first_) < static_cast<u32>(count_);
  }
  __device__ __forceinline__ float logit(int i) const { return __uint_as_float(keys_[i]); }
  // Grows towards lower tokens, so that a search for the largest finds the first of the vocabulary.
  __device__ __forceinline__ u32 from_end(int i) const {
    return static_cast<u32>(vocab_size_ - 1 - first_ - i);
  }
  __device__ __forceinline__ bool is_kept(const Kept& kept, u32 bits, int i) const {
    return bits > kept.bits || (bits == kept.bits && from_end(i) >= kept.end_bound);
  }

  // body(i, value) for each raw logit of this thread, ascending.
  template <typename Body>
  __device__ __forceinline__ void for_logits(const Body& body) const {
    constexpr int kWidth = 16 / sizeof(T);
    const T* logits = logits_ + first_;
    if (vocab_size_ % kWidth == 0) {
#pragma unroll 4
      for (int i = thread() * kWidth; i < count_; i += kThreads * kWidth) {
        const Vec<T, kWidth> vec = load_vec<kWidth>(logits + i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) body(i + j, to_float(vec.data[j]));
      }
    } else {
#pragma unroll 4
      for (int i = thread(); i < count_; i += kThreads) body(i, to_float(logits[i]));
    }
  }

  // For search(): every key of this thread, each of weight one, or of its mass.
  __device__ __forceinline__ auto for_each_counted() const {
    return [this](auto body) {
      for (int i = thread(); i < count_; i += kThreads) body(keys_[i], [] { return u64{1}; });
    };
  }
  __device__ __forceinline__ auto for_each_weighed() const {
    return [this](auto body) {
      for (int i = thread(); i < count_; i += kThreads) {
        const u32 bits = keys_[i];
        body(bits, [bits] { return mass_of_bits(bits); });
      }
    };
  }

  // Repetition, presence and frequency penalties of tokens [begin, begin + size) of this CTA's.
  __device__ void penalise(int begin, int size) {
    constexpr u32 kSeen = 1U << 31;  // in the prompt; below it, the count in the output
    const bool has_repetition = row_.repetition_penalty != 1.0F;
    for (int i = thread(); i < size; i += kThreads) counts_[i] = 0;
    __syncthreads();
    if (has_repetition) {
      for (int i = thread(); i < row_.num_prompt_tokens; i += kThreads) {
        const u32 at = static_cast<u32>(row_.prompt_tokens[i] - first_ - begin);
        if (at < static_cast<u32>(size)) atomicOr(&counts_[at], kSeen);
      }
    }
    for (int i = thread(); i < row_.num_output_tokens; i += kThreads) {
      const u32 at = static_cast<u32>(row_.output_tokens[i] - first_ - begin);
      if (at < static_cast<u32>(size)) atomicAdd(&counts_[at], 1U);
    }
    __syncthreads();
    for (int i = thread(); i < size; i += kThreads) {
      const u32 seen = counts_[i], count = seen & ~kSeen;
      if (seen == 0) continue;
      float value = logit(begin + i);
      if (has_repetition) {
        value = value > 0.0F ? value / row_.repetition_penalty : value * row_.repetition_penalty;
      }
      if (count > 0 && has_output_penalty(row_)) {  // as the CPU rounds it: nothing is fused
        value = __fsub_rn(value,
                          __fadd_rn(row_.presence_penalty,
                                    __fmul_rn(row_.frequency_penalty, static_cast<float>(count))));
      }
      keys_[begin + i] = __float_as_uint(value);
    }
    __syncthreads();
  }

  // Keeps the `number` heaviest, of equals the lowest tokens; returns their mass.
  __device__ u64 keep_number(u64 number, Kept& kept) {
    const auto found = cluster_.search(kept.bits, kOneBits + 1, number, for_each_counted());
    kept.bits = found.bound;
    u64 mass[1] = {0};
    for (int i = thread(); i < count_; i += kThreads) {
      if (keys_[i] > kept.bits) mass[0] += mass_of_bits(keys_[i]);
    }
    cluster_.reduce<Sum>(mass);
    const u64 num_ties = number - found.above;
    limit_ties(num_ties, kept);
    return mass[0] + num_ties * mass_of_bits(kept.bits);
  }

  // Of those kept, whose mass is `total`, keeps the fewest that reach top_p of it; returns their
  // mass.
  __device__ u64 keep_mass(u64 total, Kept& kept) {
    const double share = ceil(static_cast<double>(row_.top_p) * static_cast<double>(total));
    const u64 need = min(static_cast<u64>(share), total);
    const auto found = cluster_.search(kept.bits, kOneBits + 1, need, for_each_weighed());
    kept = {found.bound, 0U};
    const u64 each = mass_of_bits(kept.bits);
    const u64 num_ties = (need - found.above + each - 1) / each;
    limit_ties(num_ties, kept);
    return found.above + num_ties * each;
  }

  // Of the keys equal to kept.bits, keeps the `number` lowest tokens.
  __device__ void limit_ties(u64 number, Kept& kept) {
    u64 num_ties[1] = {0};
    for (int i = thread(); i < count_; i += kThreads) num_ties[0] += keys_[i] == kept.bits ? 1 : 0;
    cluster_.reduce<Sum>(num_ties);
    if (num_ties[0] <= number) return;
    const auto for_ties = [&](auto body) {
      for (int i = thread(); i < count_; i += kThreads) {
        if (keys_[i] == kept.bits) body(from_end(i), [] { return u64{1}; });
      }
    };
    kept.end_bound = cluster_.search(0, static_cast<u32>(vocab_size_), number, for_ties).bound;
  }

  // Brings what is kept, at most kMaxLogprobs, to the first CTA.
  __device__ void gather(const Kept& kept) {
    Shared& leader = *Cluster::at_cta(&shared_, 0);
    for (int i = thread(); i < count_; i += kThreads) {
      if (!is_kept(kept, keys_[i], i)) continue;
      const int place = atomicAdd(&leader.num_top, 1);
      leader.top_keys[place] = keys_[i];
      leader.top_tokens[place] = first_ + i;
    }
    __syncwarp();
    Cluster::arrive();
    Cluster::wait();
  }

  const SamplingRow& row_;
  const T* logits_;
  Cluster& cluster_;
  Shared& shared_;
  int vocab_size_;
  int first_, count_;  // this CTA's tokens
  u32* keys_;          // of each token of this CTA, its logit, weight or key
  u32* counts_;
};

}  // namespace deltazip::cuda::sampling
