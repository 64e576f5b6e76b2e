#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "deltazip/backend/params.h"

namespace deltazip::cuda {

// Chooses a token for every row of logits, by the rules and in the order of the CPU's sampler.
// A row's choice depends on nothing but the row: all sums are of integers.
struct SampleLaunch {
  const void* logits;       // [num_rows, vocab_size], 16-byte aligned
  const SamplingRow* rows;  // [num_rows], its pointers of the device too, checked by Ops; a row's
                            // biases ascend by token, equal tokens in the order they apply
  // [num_rows], of the device or pinned host memory. Written: token, logprob, rank, num_top,
  // is_finite, and the first num_top alternatives.
  SampledToken* results;
  // [num_rows] or nullptr: the tokens once more, for the next step's embed (0 where there is none).
  std::int32_t* tokens;
  std::int64_t num_rows, vocab_size;
  DType dtype;             // of logits: float32, float16 or bfloat16
  std::uint32_t* scratch;  // sample_scratch_bytes; one launch at a time
  int num_sms;
};
void launch_sample(const SampleLaunch& params, cudaStream_t stream);

// The largest vocabulary that a cluster's shared memory holds, for what a block may have of it; or
// that is served without clusters.
std::int64_t max_sample_vocab(std::size_t shared_bytes_per_block);
// Zero where clusters hold the rows.
std::size_t sample_scratch_bytes(std::int64_t vocab_size, int num_sms);

}  // namespace deltazip::cuda
