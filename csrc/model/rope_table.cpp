#include "rope_table.h"

#include <algorithm>

#include "deltazip/base/error.h"

namespace deltazip {

std::size_t RopeTable::bytes_for(const ModelConfig& config, std::int64_t max_length,
                                 std::int32_t max_batch_tokens) {
  const std::int64_t num_rows = Rope(config).depends_on_length(max_length)
                                    ? config.max_positions + max_batch_tokens
                                    : max_length;
  return static_cast<std::size_t>(num_rows * config.head_dim) * sizeof(float);
}

RopeTable::RopeTable(Backend& backend, const ModelConfig& config, std::int64_t max_length,
                     std::int32_t max_batch_tokens, Stream& stream)
    : backend_(backend),
      rope_(config),
      max_length_(max_length),
      num_fixed_rows_(max_length),
      num_step_rows_(0),
      head_dim_(config.head_dim) {
  if (rope_.depends_on_length(max_length)) {
    num_fixed_rows_ = config.max_positions;
    num_step_rows_ = max_batch_tokens;
  }
  const std::size_t row = static_cast<std::size_t>(head_dim_);
  const std::size_t row_bytes = row * sizeof(float);
  table_ = backend.allocate(static_cast<std::size_t>(num_fixed_rows_ + num_step_rows_) * row_bytes);
  if (num_step_rows_ > 0) {
    for (Buffer& staging : staging_) {
      staging = backend.allocate_host(static_cast<std::size_t>(num_step_rows_) * row_bytes);
    }
  }
  std::vector<float> host(static_cast<std::size_t>(num_fixed_rows_) * row);
  for (std::int64_t position = 0; position < num_fixed_rows_; ++position) {
    rope_.write_angles(position, 0, {host.data() + static_cast<std::size_t>(position) * row, row});
  }
  backend.copy_to_device(table_.data(), host.data(), host.size() * sizeof(float), stream);
  stream.synchronize();
  rows_.reserve(static_cast<std::size_t>(max_batch_tokens));
}

std::span<const std::int32_t> RopeTable::rows(std::span<const std::int32_t> positions,
                                              std::span<const std::int32_t> lengths,
                                              Stream& stream) {
  rows_.clear();
  const std::size_t row = static_cast<std::size_t>(head_dim_);
  std::size_t num_own = 0;
  auto* const staging = static_cast<float*>(staging_[next_staging_].data());
  for (std::size_t i = 0; i < positions.size(); ++i) {
    const std::int32_t position = positions[i];
    DZ_CHECK(position >= 0 && position < max_length_, "position ", position,
             " is outside the model's ", max_length_, " positions");
    if (!rope_.depends_on_length(lengths[i])) {
      DZ_CHECK(position < num_fixed_rows_, "position ", position, " is beyond its rope length ",
               lengths[i]);
      rows_.push_back(position);
      continue;
    }
    float* out = staging + num_own * row;
    rope_.write_angles(position, lengths[i], {out, row});
    rows_.push_back(
        static_cast<std::int32_t>(num_fixed_rows_ + static_cast<std::int64_t>(num_own)));
    ++num_own;
  }
  if (num_own > 0) {
    auto* tail =
        static_cast<float*>(table_.data()) + static_cast<std::size_t>(num_fixed_rows_) * row;
    backend_.copy_to_device(tail, staging, num_own * row * sizeof(float), stream);
    next_staging_ = 1 - next_staging_;
  }
  return rows_;
}

ConstTensorView RopeTable::angles() const {
  return {table_.data(), DType::kFloat32, {num_fixed_rows_ + num_step_rows_, head_dim_}};
}

}  // namespace deltazip
