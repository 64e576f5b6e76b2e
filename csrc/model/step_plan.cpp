#include "step_plan.h"

#include <algorithm>

#include "deltazip/base/error.h"

namespace deltazip {

void Batch::clear() {
  tokens.clear();
  positions.clear();
  cache_slots.clear();
  rope_lengths.clear();
  segments.clear();
  sequences.clear();
  logit_rows.clear();
}

StepPlan::StepPlan(const ModelConfig& config, std::int32_t max_rows, std::int32_t max_logit_rows)
    : config_(config), kinds_{&VariantLayer::input_norm, &VariantLayer::post_attention_norm} {
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

void StepPlan::build(const Batch& batch, std::int32_t task_capacity) {
  if (!is_built_for(batch, task_capacity)) {
    add_vectors(batch);
    add_tasks(batch);
  }
  add_logit_rows(batch);
}

bool StepPlan::is_built_for(const Batch& batch, std::int32_t task_capacity) {
  const auto same = [](const BuiltSegment& built, const Segment& segment) {
    return built == BuiltSegment{segment.variant->id, segment.first_row, segment.num_rows};
  };
  if (task_capacity == task_capacity_ && std::ranges::equal(built_, batch.segments, same)) {
    return true;
  }
  num_rows_ = batch.tokens.size();
  task_capacity_ = task_capacity;
  built_.clear();
  for (const Segment& segment : batch.segments) {
    built_.push_back({segment.variant->id, segment.first_row, segment.num_rows});
  }
  return false;
}

void StepPlan::check(const Batch& batch, std::int32_t max_rows, std::int32_t max_logit_rows) const {
  const std::size_t rows = batch.tokens.size();
  DZ_CHECK(rows > 0 && rows <= static_cast<std::size_t>(max_rows), "batch: expected 1 to ",
           max_rows, " rows, got ", rows);
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

  DZ_CHECK(batch.logit_rows.size() <= static_cast<std::size_t>(max_logit_rows), "batch: at most ",
           max_logit_rows, " logit rows, got ", batch.logit_rows.size());
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
    std::int64_t out_offset;
  };
  const std::array<std::vector<Part>, kNumProducts> products = {{
      {{&VariantLayer::q, 0}, {&VariantLayer::k, q_size}, {&VariantLayer::v, q_size + kv_size}},
      {{&VariantLayer::o, 0}},
      {{&VariantLayer::gate, 0}, {&VariantLayer::up, config_.intermediate_size}},
      {{&VariantLayer::down, 0}},
  }};
  tasks_.clear();
  task_ends_.clear();
  for (std::size_t layer = 0; layer < static_cast<std::size_t>(config_.num_layers); ++layer) {
    for (const std::vector<Part>& parts : products) {
      const std::size_t first = tasks_.size();
      // By rows, then by columns: so Ops sees at a glance that none overlap.
      for (const Segment& segment : batch.segments) {
        for (const Part& part : parts) {
          add_task(tasks_, segment.variant->layers[layer].*part.delta, segment.first_row,
                   segment.num_rows, part.out_offset);
        }
      }
      fill_up(tasks_, first, parts.size());
      task_ends_.push_back(tasks_.size());
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
    if (next == first) continue;
    add_task(lm_head_tasks_, segment.variant->lm_head, static_cast<std::int32_t>(first),
             static_cast<std::int32_t>(next - first), 0);
  }
  fill_up(lm_head_tasks_, 0, 1);
}

void StepPlan::add_task(std::vector<SbmmTask>& tasks, const DeltaMatrix& delta,
                        std::int32_t first_row, std::int32_t num_rows,
                        std::int64_t out_offset) const {
  if (delta.data != nullptr) tasks.push_back({delta, first_row, num_rows, out_offset});
}

void StepPlan::fill_up(std::vector<SbmmTask>& tasks, std::size_t first,
                       std::size_t num_matrices) const {
  if (task_capacity_ == kAsNeeded) return;
  const std::size_t end = first + num_matrices * static_cast<std::size_t>(task_capacity_);
  DZ_INTERNAL(tasks.size() <= end, "a padded step has ", task_capacity_, " tasks for each matrix, ",
              tasks.size() - first, " are needed for ", num_matrices);
  tasks.resize(end);
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
