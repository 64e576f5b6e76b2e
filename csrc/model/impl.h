#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "deltazip/model/model.h"
#include "rope_table.h"
#include "step_plan.h"
#include "weights.h"

namespace deltazip {

struct Model::Impl {
  struct Scratch;

  Impl(Backend& backend, const Checkpoint& checkpoint, const ModelConfig& config,
       const ModelSizes& sizes);
  ~Impl();

  ConstTensorView forward(const Batch& batch, KvCache& cache, Stream& stream);
  void run_padded(std::int32_t task_capacity, KvCache& cache, Stream& stream);
  void rehearse_decode(std::int32_t num_rows, std::int32_t num_variants, KvCache& cache,
                       Stream& stream);
  ConstTensorView rehearse_prefill(std::int32_t num_rows, KvCache& cache, Stream& stream);
  // The ops of a step, always in the same order for batches of equal shape.
  void run_decoder(const Batch& batch, std::span<const std::int32_t> angle_rows,
                   const KvCache& cache, Stream& stream);
  void make_logits(TensorView residual, ConstTensorView block, Stream& stream);
  std::int32_t generation_of(const KvCache& cache);

  Backend& backend;
  ModelConfig config;
  const ModelSizes sizes;
  BaseWeights weights;
  RopeTable rope;
  StepPlan plan;
  Batch padded;                                // a decode step of one of the backend's sizes
  std::vector<KvLayer> last_cache;             // of the last padded step
  std::int32_t cache_generation = 0;           // counts its changes
  std::atomic<std::uint64_t> last_variant{0};  // bind() is for any thread
  std::unique_ptr<Scratch> scratch;
};

}  // namespace deltazip
