#include "step_plan.h"

#include <algorithm>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

void add_task(std::vector<SbmmTask>& tasks, const DeltaMatrix& delta, const Segment& segment,
              std::int64_t out_offset) {
  if (delta.data == nullptr) return;
  tasks.push_back({delta, segment.first_row, segment.num_rows, out_offset});
}

// To `task_capacity` tasks for each matrix, from `first` on.
void fill_up(std::vector<SbmmTask>& tasks, std::size_t first, std::size_t num_matrices,
             std::int32_t task_capacity) {
  if (task_capacity == StepPlan::kAsNeeded) return;
  const std::size_t end = first + num_matrices * static_cast<std::size_t>(task_capacity);
  DZ_INTERNAL(tasks.size() <= end, "a padded step has ", task_capacity, " tasks for each matrix, ",
              tasks.size() - first, " are needed for ", num_matrices);
  tasks.resize(end);
}

}  // namespace

void Batch::clear() {
  tokens.clear();
  positions.clear();
  cache_slots.clear();
  rope_lengths.clear();
  segments.clear();
  sequences.clear();
  logit_rows.clear();
}

RowPlan::RowPlan(const ModelConfig& config, std::int32_t first_layer, std::int32_t max_rows)
    : config_(config),
      first_layer_(first_layer),
      kinds_{&VariantLayer::input_norm, &VariantLayer::post_attention_norm} {
  if (config.attention_bias) {
    kinds_.insert(kinds_.end(), {&VariantLayer::qkv_bias, &VariantLayer::o_bias});
  }
  if (config.mlp_bias) {
    kinds_.insert(kinds_.end(), {&VariantLayer::gate_up_bias, &VariantLayer::down_bias});
  }
  const auto num_layers = static_cast<std::size_t>(config.num_layers - first_layer);
  vectors_.reserve(num_layers * kinds_.size() * static_cast<std::size_t>(max_rows));
  task_ends_.reserve(num_layers * kNumProducts);
}

void RowPlan::build(std::span<const Segment> segments, std::int32_t task_capacity) {
  add_vectors(segments);
  add_tasks(segments, task_capacity);
}

void RowPlan::add_vectors(std::span<const Segment> segments) {
  num_rows_ = 0;
  for (const Segment& segment : segments) num_rows_ += static_cast<std::size_t>(segment.num_rows);
  vectors_.clear();
  for (std::int32_t layer = first_layer_; layer < config_.num_layers; ++layer) {
    for (const LayerVector kind : kinds_) {
      for (const Segment& segment : segments) {
        vectors_.insert(vectors_.end(), static_cast<std::size_t>(segment.num_rows),
                        segment.variant->layers[static_cast<std::size_t>(layer)].*kind);
      }
    }
  }
}

void RowPlan::add_tasks(std::span<const Segment> segments, std::int32_t task_capacity) {
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
  for (std::int32_t layer = first_layer_; layer < config_.num_layers; ++layer) {
    for (const std::vector<Part>& parts : products) {
      const std::size_t first = tasks_.size();
      // By rows, then by columns: so Ops sees at a glance that none overlap.
      for (const Segment& segment : segments) {
        const VariantLayer& variant = segment.variant->layers[static_cast<std::size_t>(layer)];
        for (const Part& part : parts) {
          add_task(tasks_, variant.*part.delta, segment, part.out_offset);
        }
      }
      fill_up(tasks_, first, parts.size(), task_capacity);
      task_ends_.push_back(tasks_.size());
    }
  }
}

std::span<const float* const> RowPlan::vectors(std::int32_t layer, LayerVector which) const {
  const auto kind = static_cast<std::size_t>(std::ranges::find(kinds_, which) - kinds_.begin());
  const auto place = static_cast<std::size_t>(layer - first_layer_) * kinds_.size() + kind;
  return {vectors_.data() + place * num_rows_, num_rows_};
}

std::span<const SbmmTask> RowPlan::tasks(std::int32_t layer, Product product) const {
  const std::size_t at = static_cast<std::size_t>(layer - first_layer_) * kNumProducts +
                         static_cast<std::size_t>(product);
  const std::size_t begin = at == 0 ? 0 : task_ends_[at - 1];
  return {tasks_.data() + begin, task_ends_[at] - begin};
}

StepPlan::StepPlan(const ModelConfig& config, std::int32_t max_rows, std::int32_t max_logit_rows)
    : rows_(config, 0, max_rows), logit_rows_(config, config.num_layers - 1, max_logit_rows) {
  embeddings_.reserve(static_cast<std::size_t>(max_rows));
  final_norms_.reserve(static_cast<std::size_t>(max_logit_rows));
}

void StepPlan::build(const Batch& batch, std::int32_t task_capacity) {
  if (!is_built_for(batch, task_capacity)) {
    rows_.build(batch.segments, task_capacity);
    add_embeddings(batch);
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

void StepPlan::add_embeddings(const Batch& batch) {
  embeddings_.clear();
  for (const Segment& segment : batch.segments) {
    const DeltaMatrix& delta = segment.variant->embedding;
    embeddings_.insert(embeddings_.end(), static_cast<std::size_t>(segment.num_rows),
                       delta.data == nullptr ? nullptr : &delta);
  }
}

void StepPlan::add_logit_rows(const Batch& batch) {
  logit_segments_.clear();
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
    logit_segments_.push_back({segment.variant, static_cast<std::int32_t>(first),
                               static_cast<std::int32_t>(next - first)});
    add_task(lm_head_tasks_, segment.variant->lm_head, logit_segments_.back(), 0);
  }
  fill_up(lm_head_tasks_, 0, 1, task_capacity_);
  if (batch.logit_rows.size() < batch.tokens.size()) {
    logit_rows_.build(logit_segments_, task_capacity_);
  }
}

}  // namespace deltazip
