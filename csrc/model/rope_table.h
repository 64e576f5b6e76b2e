#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "deltazip/backend/backend.h"
#include "rope.h"

namespace deltazip {

// Cosines and sines on the device, one row a position. Where frequencies depend on a sequence's
// length (dynamic scaling), a step's rows beyond the trained length are written behind the table.
class RopeTable {
 public:
  RopeTable(Backend& backend, const ModelConfig& config, std::int64_t max_length,
            std::int32_t max_batch_tokens, Stream& stream);

  // What the constructor allocates on the device.
  static std::size_t bytes_for(const ModelConfig& config, std::int64_t max_length,
                               std::int32_t max_batch_tokens);

  // The table's row for each row of a batch. Valid until the next call.
  // Throws InvalidArgument for a position outside [0, max_length).
  std::span<const std::int32_t> rows(std::span<const std::int32_t> positions,
                                     std::span<const std::int32_t> lengths, Stream& stream);
  ConstTensorView angles() const;  // [num_rows, head_dim]
  std::size_t num_bytes() const { return table_.num_bytes(); }

 private:
  Backend& backend_;
  Rope rope_;
  std::int64_t max_length_, num_fixed_rows_, num_step_rows_;
  std::int32_t head_dim_;
  Buffer table_;  // [num_fixed_rows + num_step_rows, head_dim]
  // Host, [num_step_rows, head_dim]: one may still be read while the next step fills the other.
  std::array<Buffer, 2> staging_;
  std::size_t next_staging_ = 0;
  std::vector<std::int32_t> rows_;
};

}  // namespace deltazip
