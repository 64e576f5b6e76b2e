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
// kernel: devices read these host arrays while later layers run. Memory is kept between steps, and
// so is the content while the segments stay the same, as they do from one decode to the next.
class StepPlan {
 public:
  using LayerVector = const float* VariantLayer::*;

  // A padded step: each product has this many tasks for each of its matrices, whatever the
  // variants of the batch have. kAsNeeded: only those with something to do.
  static constexpr std::int32_t kAsNeeded = -1;

  StepPlan(const ModelConfig& config, std::int32_t max_rows, std::int32_t max_logit_rows);

  // Throws InvalidArgument if the batch is not well-formed, or larger than it may be.
  void check(const Batch& batch, std::int32_t max_rows, std::int32_t max_logit_rows) const;
  // A batch that passed check(). `task_capacity` is at least the number of its segments that have
  // deltas.
  void build(const Batch& batch, std::int32_t task_capacity = kAsNeeded);

  // The variant's vector for each row.
  std::span<const float* const> vectors(std::int32_t layer, LayerVector which) const;
  std::span<const SbmmTask> tasks(std::int32_t layer, Product product) const;
  std::span<const DeltaMatrix* const> embeddings() const { return embeddings_; }
  std::span<const float* const> final_norms() const { return final_norms_; }  // of logit rows
  std::span<const SbmmTask> lm_head_tasks() const { return lm_head_tasks_; }  // of logit rows

 private:
  struct BuiltSegment {
    std::uint64_t variant;
    std::int32_t first_row, num_rows;
    bool operator==(const BuiltSegment&) const = default;
  };

  bool is_built_for(const Batch& batch, std::int32_t task_capacity);  // remembers it if not
  void add_vectors(const Batch& batch);
  void add_tasks(const Batch& batch);
  void add_logit_rows(const Batch& batch);
  void add_task(std::vector<SbmmTask>& tasks, const DeltaMatrix& delta, std::int32_t first_row,
                std::int32_t num_rows, std::int64_t out_offset) const;
  void fill_up(std::vector<SbmmTask>& tasks, std::size_t first, std::size_t num_matrices) const;

  const ModelConfig& config_;
  std::size_t num_rows_ = 0;
  std::int32_t task_capacity_ = kAsNeeded;
  std::vector<BuiltSegment> built_;
  std::vector<LayerVector> kinds_;     // those this model has
  std::vector<const float*> vectors_;  // [layer][kind][row]
  std::vector<SbmmTask> tasks_;
  std::vector<std::size_t> task_ends_;  // [layer][product], into tasks_
  std::vector<const DeltaMatrix*> embeddings_;
  std::vector<const float*> final_norms_;
  std::vector<SbmmTask> lm_head_tasks_;
};

}  // namespace deltazip
