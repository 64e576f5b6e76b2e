#pragma once

#include <memory>
#include <span>

#include "deltazip/model/model.h"
#include "rope_table.h"
#include "step_plan.h"
#include "weights.h"

namespace deltazip {

struct Model::Impl {
  struct Scratch;

  Impl(Backend& backend, const Checkpoint& checkpoint, const ModelConfig& config,
       std::int32_t max_batch_tokens, std::int32_t max_logit_rows, std::int64_t max_length);
  ~Impl();

  ConstTensorView forward(const Batch& batch, KvCache& cache, Stream& stream);
  ConstTensorView logits(const Batch& batch, TensorView residual, TensorView block, Stream& stream);
  // y = x * weight^T, plus the deltas of the rows that have one.
  void project(TensorView y, ConstTensorView x, const PackedMatrix& weight,
               std::span<const SbmmTask> tasks, Stream& stream);

  Backend& backend;
  ModelConfig config;
  BaseWeights weights;
  RopeTable rope;
  StepPlan plan;
  std::unique_ptr<Scratch> scratch;
};

}  // namespace deltazip
