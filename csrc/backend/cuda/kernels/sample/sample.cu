#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "backend/cuda/kernels/device/launch.h"
#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/probe.h"
#include "backend/cuda/kernels/sample/row_sampler.cuh"
#include "backend/cuda/kernels/sample/sample.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

using namespace sampling;  // NOLINT(google-build-using-namespace): this file is its face

// The chosen token, or -1 where there is no choice. `best` is of the raw logits.
template <typename T>
__device__ std::int32_t choose(RowSampler<T>& sampler, const SamplingRow& row, Best& best) {
  const bool draws = row.forced_token < 0 && !is_greedy(row);
  const bool changes = row.forced_token < 0 && changes_logits(row);
  if (!sampler.read_logits(draws || changes, best)) return -1;
  if (row.forced_token >= 0) return row.forced_token;
  Best changed = best;
  if (changes) {
    sampler.change_logits();
    if (!sampler.find_best(changed)) return -1;
  }
  return draws ? sampler.draw(value_of_key(changed.key)) : changed.token;
}

template <typename T>
__device__ __forceinline__ void sample_row(const SampleLaunch& params, std::int64_t index,
                                           Shared& shared, u32* keys, u32* counts) {
  if (threadIdx.x == 0) shared.num_top = 0;
  Cluster::arrive();
  const SamplingRow& row = params.rows[index];
  Cluster cluster(shared.exchange);
  RowSampler<T> sampler(params, row,
                        static_cast<const T*>(params.logits) + index * params.vocab_size, cluster,
                        shared, keys, counts);
  griddep_wait();
  Cluster::wait();
  Best best;
  const std::int32_t token = choose(sampler, row, best);
  const bool scores = token >= 0 && row.num_logprobs >= 0;
  SampledToken& out = params.results[index];
  if (cluster.rank() == 0 && threadIdx.x == 0) {
    out.token = token;
    out.is_finite = token >= 0;
    if (params.tokens != nullptr) params.tokens[index] = max(token, 0);
    if (!scores) {
      out.logprob = 0.0F;
      out.rank = 0;
      out.num_top = 0;
    }
  }
  if (scores) sampler.score(token, best, out);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) sample_kernel(const SampleLaunch params) {
  extern __shared__ uint4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  u32* const words = reinterpret_cast<u32*>(&shared + 1);
  griddep_launch();
  if constexpr (kRowCtas > 1) {
    const auto share = static_cast<int>(share_of(params.vocab_size, kRowCtas));
    sample_row<T>(params, blockIdx.x / kRowCtas, shared, words, words + share);
  } else {
    u32* const keys = params.scratch + blockIdx.x * share_of(params.vocab_size, kRowCtas);
    for (std::int64_t row = blockIdx.x; row < params.num_rows; row += gridDim.x) {
      sample_row<T>(params, row, shared, keys, words);
      __syncthreads();  // the next row's exchange overwrites this one's
    }
  }
}

// All of it dynamic: static memory would count against the 48 KB that need no permission.
std::size_t shared_bytes(std::int64_t vocab_size, bool in_clusters) {
  const std::int64_t share =
      share_of(vocab_size, in_clusters ? kClusterSize : kRowCtasWithoutClusters);
  const std::int64_t num_words = (in_clusters ? share : 0) + std::min(share, kMaxCounts);
  return sizeof(Shared) + sizeof(u32) * static_cast<std::size_t>(num_words);
}

}  // namespace

std::int64_t max_sample_vocab(std::size_t shared_bytes_per_block) {
  if (!runs_hopper_code()) return kMaxVocabInScratch;
  const auto words = static_cast<std::int64_t>((shared_bytes_per_block - sizeof(Shared)) / 4);
  return (words - kMaxCounts) / 8 * 8 * kClusterSize;
}

std::size_t sample_scratch_bytes(std::int64_t vocab_size, int num_sms) {
  if (runs_hopper_code()) return 0;
  return sizeof(u32) * static_cast<std::size_t>(num_sms) *
         static_cast<std::size_t>(share_of(vocab_size, kRowCtasWithoutClusters));
}

void launch_sample(const SampleLaunch& params, cudaStream_t stream) {
  const bool in_clusters = runs_hopper_code();
  const std::int64_t num_ctas = in_clusters
                                    ? params.num_rows * kClusterSize
                                    : std::min<std::int64_t>(params.num_rows, params.num_sms);
  const auto with_type = [&]<typename T>() {
    const std::size_t num_bytes = shared_bytes(params.vocab_size, in_clusters);
    allow_shared_memory(sample_kernel<T>, num_bytes);
    launch(sample_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(num_ctas)),
            .block = dim3(kThreads),
            .shared_bytes = num_bytes,
            .cluster_size = in_clusters ? kClusterSize : 1},
           stream, params);
  };
  switch (params.dtype) {
    case DType::kFloat32:
      return with_type.template operator()<float>();
    case DType::kFloat16:
      return with_type.template operator()<__half>();
    case DType::kBFloat16:
      return with_type.template operator()<__nv_bfloat16>();
    default:
      DZ_CHECK(false, "sample: logits must be floating-point, got ", name(params.dtype));
  }
}

}  // namespace deltazip::cuda
