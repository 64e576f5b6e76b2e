#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "deltazip/model/model.h"
#include "weights.h"

namespace deltazip {

// The dense products of a layer, each with its own delta tasks.
enum class Product : std::uint8_t { kQkv, kO, kGateUp, kDown };
inline constexpr std::size_t kNumProducts = 4;

// What every op of a step is told about the batch's variants, resolved once before the first
// kernel: devices read these host arrays while later layers run. Memory is kept between steps.
class StepPlan {
 public:
  using LayerVector = const float* VariantLayer::*;

  StepPlan(const ModelConfig& config, std::int32_t max_rows, std::int32_t max_logit_rows);

  // Throws InvalidArgument if the batch is not well-formed.
  void build(const Batch& batch);

  // The variant's vector for each row.
  std::span<const float* const> vectors(std::int32_t layer, LayerVector which) const;
  std::span<const SbmmTask> tasks(std::int32_t layer, Product product) const;
  std::span<const DeltaMatrix* const> embeddings() const { return embeddings_; }
  std::span<const float* const> final_norms() const { return final_norms_; }  // of logit rows
  std::span<const SbmmTask> lm_head_tasks() const { return lm_head_tasks_; }  // of logit rows

 private:
  void check(const Batch& batch) const;
  void add_vectors(const Batch& batch);
  void add_tasks(const Batch& batch);
  void add_logit_rows(const Batch& batch);

  const ModelConfig& config_;
  std::int32_t max_rows_, max_logit_rows_;
  std::size_t num_rows_ = 0;
  std::vector<LayerVector> kinds_;     // those this model has
  std::vector<const float*> vectors_;  // [layer][kind][row]
  std::vector<SbmmTask> tasks_;
  std::vector<std::size_t> task_ends_;  // [layer][product], into tasks_
  std::vector<const DeltaMatrix*> embeddings_;
  std::vector<const float*> final_norms_;
  std::vector<SbmmTask> lm_head_tasks_;
};

}  // namespace deltazip
