#include "backend/cuda/kernels/paged_attention/plan.h"

#include <algorithm>
#include <cstring>

namespace deltazip::cuda {
namespace {

std::int32_t divide_up(std::int32_t value, std::int32_t by) { return (value + by - 1) / by; }

// One query gets up to kMaxChunks chunks, n queries share that many, so that scratch is bounded by
// the number of sequences.
std::int32_t chunk_keys(const AttentionSequence& sequence) {
  const std::int32_t most = std::max(1, kMaxChunks / sequence.num_rows);
  return kDecodeChunk *
         std::max(1, divide_up(divide_up(sequence.context_length, kDecodeChunk), most));
}

}  // namespace

bool may_prefill(const AttentionShape& shape) {
  const std::int64_t group = shape.num_heads / shape.num_kv_heads;
  return shape.num_rows > shape.num_sequences && shape.num_rows * group > kMaxDecodePacked;
}

// Tiles of head_dim 256 are half as high: its accumulators fill the registers.
std::int32_t prefill_rows(std::int32_t head_dim) { return head_dim > 128 ? 64 : 128; }

AttentionScratchSize attention_scratch_size(std::int64_t max_sequences, std::int32_t num_heads,
                                            std::int32_t head_dim) {
  AttentionScratchSize size;
  size.counters = static_cast<std::size_t>(max_sequences * num_heads);
  size.partial_rows = size.counters * kMaxChunks;
  size.num_bytes = size.partial_rows * (static_cast<std::size_t>(head_dim) + 2) * sizeof(float) +
                   size.counters * sizeof(std::uint32_t);
  return size;
}

void AttentionPlan::build(std::span<const AttentionSequence> sequences,
                          const AttentionShape& shape) {
  const std::int32_t group = shape.num_heads / shape.num_kv_heads;
  const bool has_prefill = may_prefill(shape);
  decode_.clear();
  short_decode_.clear();
  prefill_.clear();
  std::int32_t num_table_words = 0, num_partial = 0, num_counters = 0;
  for (const AttentionSequence& sequence : sequences) {
    if (sequence.num_rows == 0) continue;
    const std::int32_t num_packed = sequence.num_rows * group;
    const bool is_prefill = has_prefill && sequence.num_rows > 1 && num_packed > kMaxDecodePacked;
    const std::int32_t tile_rows = is_prefill ? prefill_rows(shape.head_dim) : kDecodeRows;
    const std::int32_t first_limit = sequence.context_length - sequence.num_rows + 1;
    const std::int32_t chunk = is_prefill ? sequence.context_length : chunk_keys(sequence);
    for (std::int32_t first = 0; first < num_packed; first += tile_rows) {
      AttentionItem item{};
      item.first_row = sequence.first_row;
      item.first_packed = first;
      item.num_packed = std::min(tile_rows, num_packed - first);
      item.first_limit = first_limit;
      item.block_offset = num_table_words;
      const std::int32_t num_keys = first_limit + (first + item.num_packed - 1) / group;
      item.num_chunks = divide_up(num_keys, chunk);
      if (item.num_chunks > 1) {
        item.partial = num_partial;
        item.counter = num_counters;
        num_partial += item.num_chunks * item.num_packed * shape.num_kv_heads;
        num_counters += shape.num_kv_heads;
      }
      for (std::int32_t c = 0; c < item.num_chunks; ++c) {
        item.chunk = c;
        item.key_begin = c * chunk;
        item.key_end = std::min(num_keys, item.key_begin + chunk);
        if (is_prefill) {
          prefill_.push_back(item);
        } else {
          const bool is_full = item.key_end - item.key_begin >= kDecodeChunk;
          (is_full ? decode_ : short_decode_).push_back(item);
        }
      }
    }
    num_table_words += divide_up(sequence.context_length, shape.block_size);
  }
  // Long items first: CTAs take items by stride, and the last round should be a short one.
  std::stable_sort(
      prefill_.begin(), prefill_.end(),
      [](const AttentionItem& a, const AttentionItem& b) { return a.key_end > b.key_end; });
  decode_.insert(decode_.end(), short_decode_.begin(), short_decode_.end());
  header_.num_decode = static_cast<std::int32_t>(decode_.size());
  header_.num_prefill = static_cast<std::int32_t>(prefill_.size());

  constexpr std::size_t kHeaderWords = sizeof(AttentionPlanHeader) / 4;
  constexpr std::size_t kItemWords = sizeof(AttentionItem) / 4;
  const std::size_t table = kHeaderWords + num_items() * kItemWords;
  words_.resize(table + static_cast<std::size_t>(num_table_words));
  std::int32_t* to = words_.data();
  std::memcpy(to, &header_, sizeof header_);
  to += kHeaderWords;
  for (std::vector<AttentionItem>* items : {&decode_, &prefill_}) {
    for (AttentionItem& item : *items) {
      item.block_offset += static_cast<std::int32_t>(table);
      std::memcpy(to, &item, sizeof item);
      to += kItemWords;
    }
  }
  for (const AttentionSequence& sequence : sequences) {
    if (sequence.num_rows == 0) continue;
    to = std::copy_n(sequence.blocks, divide_up(sequence.context_length, shape.block_size), to);
  }
}

AttentionItem AttentionPlan::item(std::size_t i) const {
  AttentionItem item;
  std::memcpy(&item, words_.data() + sizeof(AttentionPlanHeader) / 4 + i * sizeof item / 4,
              sizeof item);
  return item;
}

}  // namespace deltazip::cuda
