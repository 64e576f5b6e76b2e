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

// What the ops of some layers are told about the variants of some rows. Memory is kept.
class RowPlan {
 public:
  using LayerVector = const float* VariantLayer::*;

  // Layers from `first_layer` to the last.
  RowPlan(const ModelConfig& config, std::int32_t first_layer, std::int32_t max_rows);

  void build(std::span<const Segment> segments, std::int32_t task_capacity);

  // The variant's vector for each row.
  std::span<const float* const> vectors(std::int32_t layer, LayerVector which) const;
  std::span<const SbmmTask> tasks(std::int32_t layer, Product product) const;

 private:
  void add_vectors(std::span<const Segment> segments);
  void add_tasks(std::span<const Segment> segments, std::int32_t task_capacity);

  const ModelConfig& config_;
  std::int32_t first_layer_;
  std::size_t num_rows_ = 0;
  std::vector<LayerVector> kinds_;     // those this model has
  std::vector<const float*> vectors_;  // [layer][kind][row]
  std::vector<SbmmTask> tasks_;
  std::vector<std::size_t> task_ends_;  // [layer][product], into tasks_
};

// What every op of a step is told about the batch's variants, resolved once before the first
// kernel: devices read these host arrays while later layers run. Memory is kept between steps, and
// so is the content while the segments stay the same, as they do from one decode to the next.
class StepPlan {
 public:
  // A padded step: each product has this many tasks for each of its matrices, whatever the
  // variants of the batch have. kAsNeeded: only those with something to do.
  static constexpr std::int32_t kAsNeeded = -1;

  StepPlan(const ModelConfig& config, std::int32_t max_rows, std::int32_t max_logit_rows);

  // Throws InvalidArgument if the batch is not well-formed, or larger than it may be.
  void check(const Batch& batch, std::int32_t max_rows, std::int32_t max_logit_rows) const;
  // A batch that passed check(). `task_capacity` is at least the number of its segments that have
  // deltas.
  void build(const Batch& batch, std::int32_t task_capacity = kAsNeeded);

  const RowPlan& rows() const { return rows_; }
  // Of the logit rows, in the last layer; only where the batch has other rows too.
  const RowPlan& logit_rows() const { return logit_rows_; }
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
  void add_embeddings(const Batch& batch);
  void add_logit_rows(const Batch& batch);

  std::int32_t task_capacity_ = kAsNeeded;
  std::vector<BuiltSegment> built_;
  RowPlan rows_, logit_rows_;
  std::vector<const DeltaMatrix*> embeddings_;
  std::vector<Segment> logit_segments_;  // rows are places among the logit rows
  std::vector<const float*> final_norms_;
  std::vector<SbmmTask> lm_head_tasks_;
};

}  // namespace deltazip
