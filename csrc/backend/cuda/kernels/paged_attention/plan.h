#pragma once

// The work list of one step's attention, made on the host once for all layers. No device code.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "deltazip/backend/params.h"

namespace deltazip::cuda {

// One tile of one sequence's packed query rows against one range of its keys, for every KV head.
// Packed row p of a sequence is query p / group, head p % group of the KV head's group.
struct alignas(16) AttentionItem {
  std::int32_t first_row;     // of the sequence, in qkv and out
  std::int32_t first_packed;  // of the tile, within the sequence
  std::int32_t num_packed;    // rows of the tile
  std::int32_t first_limit;   // keys seen by the sequence's query 0; query i sees i more
  std::int32_t key_begin, key_end;
  std::int32_t block_offset;  // of the sequence's block table, in words from the plan's start
  std::int32_t chunk, num_chunks;
  std::int32_t partial;  // first row of partial results, see partial_row()
  std::int32_t counter;  // of KV head 0; one a KV head
  std::int32_t unused;
};
static_assert(sizeof(AttentionItem) == 48);

// Starts the plan. Decode items follow, then prefill items, then block tables: one array, since
// what varies in size between replays of a step must be staged as one.
struct alignas(16) AttentionPlanHeader {
  std::int32_t num_decode, num_prefill;
  std::int32_t unused[14];
};
static_assert(sizeof(AttentionPlanHeader) == 64);

struct AttentionShape {
  std::int32_t num_heads, num_kv_heads, head_dim, block_size;
  std::int64_t num_rows;
  std::int32_t num_sequences;
};

// Keys of a decode item; contexts are cut at its multiples, so that a row's result does not depend
// on the batch. 256 keys x 512 bytes (head_dim 128) take one CTA about as long as a launch.
inline constexpr std::int32_t kDecodeChunk = 256;
// Most chunks of a row; longer contexts get longer chunks. Bounds scratch, fills 132 SMs.
inline constexpr std::int32_t kMaxChunks = 32;
inline constexpr std::int32_t kDecodeRows = 16;  // packed rows of a decode item: one mma tile
// A sequence with more packed rows than this takes the prefill kernel. Up to here tiles of 16 that
// read the keys again, from L2, are cheaper than a mostly empty tile of 128.
inline constexpr std::int32_t kMaxDecodePacked = 64;

// False: whatever the sequences are, the decode kernel serves them. Depends on the shape alone.
bool may_prefill(const AttentionShape& shape);
std::int32_t prefill_rows(std::int32_t head_dim);

// What the kernel may use besides the plan; allocated once and zeroed once.
struct AttentionScratchSize {
  std::size_t partial_rows = 0;  // x (head_dim + 2) floats
  std::size_t counters = 0;
  std::size_t num_bytes = 0;
};
AttentionScratchSize attention_scratch_size(std::int64_t max_sequences, std::int32_t num_heads,
                                            std::int32_t head_dim);

class AttentionPlan {
 public:
  void build(std::span<const AttentionSequence> sequences, const AttentionShape& shape);
  std::span<const std::int32_t> words() const { return words_; }
  const AttentionPlanHeader& header() const { return header_; }
  // At index i: decode items first, then prefill items.
  AttentionItem item(std::size_t i) const;
  std::size_t num_items() const {
    return static_cast<std::size_t>(header_.num_decode) +
           static_cast<std::size_t>(header_.num_prefill);
  }

 private:
  AttentionPlanHeader header_{};
  std::vector<std::int32_t> words_;
  std::vector<AttentionItem> decode_, short_decode_, prefill_;
};

}  // namespace deltazip::cuda
