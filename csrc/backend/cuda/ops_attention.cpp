#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/cuda_ops.h"
#include "backend/cuda/kernels/paged_attention/paged_attention.h"
#include "backend/cuda/kernels/paged_attention/plan.h"

namespace deltazip::cuda {
namespace {

// What scratch is made for at first, 136 MB: growing later would meet a device whose memory the KV
// cache has taken, as the engine plans with what is free once the backend stands.
constexpr std::int32_t kLeastSequences = 256, kLeastHeads = 32, kLeastHeadDim = 128;

struct DeviceFree {
  void operator()(std::byte* memory) const { cudaFree(memory); }
};

// Partial results of split contexts and the counters that say when all are there.
class Scratch {
 public:
  Scratch(std::int32_t num_sequences, std::int32_t num_heads, std::int32_t head_dim)
      : head_dim_(head_dim), size_(attention_scratch_size(num_sequences, num_heads, head_dim)) {
    void* memory = nullptr;
    DZ_CUDA(cudaMalloc(&memory, size_.num_bytes));
    memory_.reset(static_cast<std::byte*>(memory));
    DZ_CUDA(cudaMemset(counters(), 0, size_.counters * sizeof(std::uint32_t)));
    DZ_CUDA(cudaDeviceSynchronize());
  }
  bool holds(const AttentionShape& shape) const {
    return attention_scratch_size(shape.num_sequences, shape.num_heads, shape.head_dim).counters <=
               size_.counters &&
           shape.head_dim <= head_dim_;
  }
  std::uint32_t* counters() const {
    return reinterpret_cast<std::uint32_t*>(memory_.get() + size_.num_bytes) - size_.counters;
  }
  float* partial_softmax() const { return reinterpret_cast<float*>(memory_.get()); }
  float* partial_sums() const { return partial_softmax() + 2 * size_.partial_rows; }

 private:
  std::int32_t head_dim_;
  AttentionScratchSize size_;
  std::unique_ptr<std::byte, DeviceFree> memory_;
};

bool same_sequences(std::span<const AttentionSequence> a, std::span<const AttentionSequence> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const AttentionSequence& x, const AttentionSequence& y) {
                      return x.first_row == y.first_row && x.num_rows == y.num_rows &&
                             x.context_length == y.context_length && x.blocks == y.blocks;
                    });
}

}  // namespace

void CudaOps::check_attention(const KvLayer& cache, DType dtype) const {
  DZ_CHECK(dtype == DType::kFloat16 || dtype == DType::kBFloat16,
           "paged_attention: the CUDA backend computes in float16 or bfloat16, got ", name(dtype));
  DZ_CHECK(cache.dtype == dtype, "paged_attention: the KV cache must be ", name(dtype),
           " like the activations, got ", name(cache.dtype));
  DZ_CHECK(is_attention_head_dim(cache.head_dim),
           "paged_attention: the CUDA backend serves head_dim 64, 96, 128 and 256, got ",
           cache.head_dim);
  const std::size_t shared_bytes = attention_shared_bytes(cache.head_dim);
  DZ_CHECK(shared_bytes <= info_.shared_bytes_per_block, "paged_attention: head_dim ",
           cache.head_dim, " needs ", shared_bytes,
           " bytes of shared memory a block, this device has ", info_.shared_bytes_per_block);
  DZ_CHECK(cache.block_size % 8 == 0,
           "paged_attention: the CUDA backend needs a block_size that is a multiple of 8, got ",
           cache.block_size);
  const std::int64_t rows = std::int64_t{cache.num_blocks} * cache.num_kv_heads * cache.block_size;
  DZ_CHECK(rows <= std::numeric_limits<std::int32_t>::max(),
           "paged_attention: num_blocks * num_kv_heads * block_size must be below 2^31, got ",
           rows);
}

struct CudaOps::AttentionState {
  // The scratch of a shape. What a recorded step holds must stay, so a larger one is added.
  const Scratch& scratch(const AttentionShape& shape, StepMode mode) {
    const auto found = std::find_if(scratches.begin(), scratches.end(),
                                    [&](const auto& each) { return each->holds(shape); });
    if (found != scratches.end()) return **found;
    DZ_INTERNAL(mode == StepMode::kEager, "a recorded step has not run eagerly before");
    const std::int32_t most = std::max({kLeastSequences, 2 * largest, shape.num_sequences});
    scratches.push_back(std::make_unique<Scratch>(most, shape.num_heads, shape.head_dim));
    largest = most;
    return *scratches.back();
  }

  // The plan of the step's sequences; one for all layers.
  void plan_for(std::span<const AttentionSequence> list, const AttentionShape& shape,
                std::int64_t step) {
    const bool is_known =
        step == planned_step && same_sequences(list, sequences) &&
        shape.num_heads == planned.num_heads && shape.num_kv_heads == planned.num_kv_heads &&
        shape.head_dim == planned.head_dim && shape.block_size == planned.block_size &&
        shape.num_rows == planned.num_rows;
    if (is_known) return;
    plan.build(list, shape);
    sequences.assign(list.begin(), list.end());
    planned = shape;
    planned_step = step;
  }

  AttentionPlan plan;
  AttentionShape planned{};
  std::vector<AttentionSequence> sequences;
  std::int64_t planned_step = -1;
  std::vector<std::unique_ptr<Scratch>> scratches;
  std::int32_t largest = 0;  // sequences
  std::set<std::pair<DType, std::int32_t>> prepared;
};

std::shared_ptr<CudaOps::AttentionState> CudaOps::make_attention_state() {
  auto state = std::make_shared<AttentionState>();
  state->scratches.push_back(
      std::make_unique<Scratch>(kLeastSequences, kLeastHeads, kLeastHeadDim));
  return state;
}

void CudaOps::run(const PagedAttentionParams& params, Stream& stream) {
  const KvLayer& cache = params.cache;
  check_attention(cache, params.dtype);
  DZ_CHECK(params.scale > 0, "paged_attention: the CUDA backend needs a positive scale, got ",
           params.scale);
  CudaStream& cuda_stream = to_cuda(stream);
  AttentionState& state = *attention_;
  const AttentionShape shape{params.num_heads, cache.num_kv_heads, cache.head_dim,
                             cache.block_size, params.num_rows,    params.num_sequences};
  state.plan_for({params.sequences, static_cast<std::size_t>(params.num_sequences)}, shape,
                 args_.step());
  const std::int32_t* plan = args_.put_tail(state.plan.words(), cuda_stream);
  if (!args_.launching()) return;

  const Scratch& scratch = state.scratch(shape, args_.mode());
  if (state.prepared.emplace(params.dtype, cache.head_dim).second) {
    prepare_paged_attention(params.dtype, cache.head_dim);
  }
  // What a recorded step launches may not depend on its sequences.
  const AttentionPlanHeader& header = state.plan.header();
  const bool has_decode = args_.is_recorded() || header.num_decode > 0;
  const bool has_prefill = args_.is_recorded() ? may_prefill(shape) : header.num_prefill > 0;
  launch_paged_attention({params.qkv, params.out, cache.keys, cache.values, plan,
                          scratch.partial_sums(), scratch.partial_softmax(), scratch.counters(),
                          params.num_heads, cache.num_kv_heads, cache.block_size, params.scale},
                         {params.dtype, cache.head_dim, info_.num_sms, has_prefill, has_decode},
                         cuda_stream.get());
}

}  // namespace deltazip::cuda
