#include "step_plan.h"

#include <algorithm>

#include "deltazip/base/error.h"

namespace deltazip {

StepPlan::StepPlan(const ModelConfig& config, std::int32_t max_rows, std::int32_t max_logit_rows)
    : config_(config),
      max_rows_(max_rows),
      max_logit_rows_(max_logit_rows),
      kinds_{&VariantLayer::input_norm, &VariantLayer::post_attention_norm} {
  if (config.attention_bias) {
    kinds_.insert(kinds_.end(), {&VariantLayer::qkv_bias, &VariantLayer::o_bias});
  }
  if (config.mlp_bias) {
    kinds_.insert(kinds_.end(), {&VariantLayer::gate_up_bias, &VariantLayer::down_bias});
  }
  const auto rows = static_cast<std::size_t>(max_rows);
  vectors_.reserve(static_cast<std::size_t>(config.num_layers) * kinds_.size() * rows);
  embeddings_.reserve(rows);
  final_norms_.reserve(static_cast<std::size_t>(max_logit_rows));
  task_ends_.reserve(static_cast<std::size_t>(config.num_layers) * kNumProducts);
}

void StepPlan::build(const Batch& batch) {
  check(batch);
  num_rows_ = batch.tokens.size();
  add_vectors(batch);
  add_tasks(batch);
  add_logit_rows(batch);
}

void StepPlan::check(const Batch& batch) const {
  const std::size_t rows = batch.tokens.size();
  DZ_CHECK(rows > 0 && rows <= static_cast<std::size_t>(max_rows_), "batch: expected 1 to ",
           max_rows_, " rows, got ", rows);
  DZ_CHECK(batch.positions.size() == rows && batch.cache_slots.size() == rows &&
               batch.rope_lengths.size() == rows,
           "batch: ", rows, " tokens, but ", batch.positions.size(), " positions, ",
           batch.cache_slots.size(), " cache slots, ", batch.rope_lengths.size(), " rope lengths");

  std::int64_t next_row = 0;
  for (const Segment& segment : batch.segments) {
    DZ_CHECK(segment.variant != nullptr && segment.num_rows > 0 && segment.first_row == next_row,
             "batch: expected a segment with a variant from row ", next_row, ", got rows ",
             segment.first_row, " to ", std::int64_t{segment.first_row} + segment.num_rows);
    next_row += segment.num_rows;
  }
  DZ_CHECK(next_row == static_cast<std::int64_t>(rows), "batch: segments cover ", next_row,
           " rows of ", rows);

  DZ_CHECK(batch.logit_rows.size() <= static_cast<std::size_t>(max_logit_rows_), "batch: at most ",
           max_logit_rows_, " logit rows, got ", batch.logit_rows.size());
  std::int64_t previous = -1;
  for (const std::int32_t row : batch.logit_rows) {
    DZ_CHECK(row > previous && row < static_cast<std::int64_t>(rows),
             "batch: logit rows must ascend below ", rows, ", got ", row, " after ", previous);
    previous = row;
  }
}

void StepPlan::add_vectors(const Batch& batch) {
  vectors_.clear();
  embeddings_.clear();
  for (std::size_t layer = 0; layer < static_cast<std::size_t>(config_.num_layers); ++layer) {
    for (const LayerVector kind : kinds_) {
      for (const Segment& segment : batch.segments) {
        vectors_.insert(vectors_.end(), static_cast<std::size_t>(segment.num_rows),
                        segment.variant->layers[layer].*kind);
      }
    }
  }
  for (const Segment& segment : batch.segments) {
    const DeltaMatrix& delta = segment.variant->embedding;
    embeddings_.insert(embeddings_.end(), static_cast<std::size_t>(segment.num_rows),
                       delta.data == nullptr ? nullptr : &delta);
  }
}

void StepPlan::add_tasks(const Batch& batch) {
  const std::int64_t q_size = std::int64_t{config_.num_heads} * config_.head_dim;
  const std::int64_t kv_size = std::int64_t{config_.num_kv_heads} * config_.head_dim;
  struct Part {
    DeltaMatrix VariantLayer::* delta;
    Product product;
    std::int64_t out_offset;
  };
  const std::array<Part, 7> parts = {{
      {&VariantLayer::q, Product::kQkv, 0},
      {&VariantLayer::k, Product::kQkv, q_size},
      {&VariantLayer::v, Product::kQkv, q_size + kv_size},
      {&VariantLayer::o, Product::kO, 0},
      {&VariantLayer::gate, Product::kGateUp, 0},
      {&VariantLayer::up, Product::kGateUp, config_.intermediate_size},
      {&VariantLayer::down, Product::kDown, 0},
  }};
  tasks_.clear();
  task_ends_.assign(static_cast<std::size_t>(config_.num_layers) * kNumProducts, 0);
  for (std::size_t layer = 0; layer < static_cast<std::size_t>(config_.num_layers); ++layer) {
    for (const Part& part : parts) {
      for (const Segment& segment : batch.segments) {
        const DeltaMatrix& delta = segment.variant->layers[layer].*part.delta;
        if (delta.data == nullptr) continue;
        tasks_.push_back({delta, segment.first_row, segment.num_rows, part.out_offset});
      }
      task_ends_[layer * kNumProducts + static_cast<std::size_t>(part.product)] = tasks_.size();
    }
  }
}

void StepPlan::add_logit_rows(const Batch& batch) {
  final_norms_.clear();
  lm_head_tasks_.clear();
  std::size_t next = 0;
  for (const Segment& segment : batch.segments) {
    const std::size_t first = next;
    while (next < batch.logit_rows.size() &&
           batch.logit_rows[next] < segment.first_row + segment.num_rows) {
      final_norms_.push_back(segment.variant->final_norm);
      ++next;
    }
    if (next == first || segment.variant->lm_head.data == nullptr) continue;
    lm_head_tasks_.push_back({segment.variant->lm_head, static_cast<std::int32_t>(first),
                              static_cast<std::int32_t>(next - first), 0});
  }
}

std::span<const float* const> StepPlan::vectors(std::int32_t layer, LayerVector which) const {
  const auto kind = static_cast<std::size_t>(std::ranges::find(kinds_, which) - kinds_.begin());
  const std::size_t at = (static_cast<std::size_t>(layer) * kinds_.size() + kind) * num_rows_;
  return {vectors_.data() + at, num_rows_};
}

std::span<const SbmmTask> StepPlan::tasks(std::int32_t layer, Product product) const {
  const std::size_t at =
      static_cast<std::size_t>(layer) * kNumProducts + static_cast<std::size_t>(product);
  const std::size_t begin = at == 0 ? 0 : task_ends_[at - 1];
  return {tasks_.data() + begin, task_ends_[at] - begin};
}

}  // namespace deltazip
