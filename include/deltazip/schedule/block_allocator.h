#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "deltazip/base/digest.h"
#include "deltazip/schedule/types.h"

namespace deltazip {

// Who has which KV block. Host integers only; the bytes live in KvCache. Engine thread.
// A full block may be published under a key; when its last owner leaves it stays findable, and is
// handed out again, oldest first, only when no never-used block is left.
class BlockAllocator {
 public:
  explicit BlockAllocator(std::int32_t num_blocks);

  std::optional<BlockId> allocate();  // nullopt when none is free; forgets an evicted block's key
  void share(BlockId block);          // one more owner
  void release(BlockId block);        // the last owner frees it
  std::int32_t num_owners(BlockId block) const;

  // Prefix cache. A key names a run of tokens from the start of a sequence, of one variant's
  // content and one salt, so equal keys mean equal bytes.
  void publish(BlockId block, const Digest& key);     // first come stays; others are ignored
  std::optional<BlockId> acquire(const Digest& key);  // finds and shares
  bool contains(const Digest& key) const;

  std::int32_t num_blocks() const;
  std::int32_t num_free() const;  // never-used and cached-but-unowned
  void check() const;             // free + owned == all, no block twice; throws InternalError

 private:
  struct Block {
    std::int32_t num_owners = 0;
    bool has_key = false;
    Digest key;
    BlockId older = -1, newer = -1;  // neighbours among the idle, oldest first
  };
  Block& at(BlockId block);
  const Block& at(BlockId block) const;
  void push_idle(BlockId block);
  void remove_idle(BlockId block);

  std::vector<Block> blocks_;
  std::vector<BlockId> unkeyed_;  // free, nothing to find in them; a stack
  BlockId oldest_idle_ = -1, newest_idle_ = -1;
  std::int32_t num_idle_ = 0;  // free, but still found by their key
  std::unordered_map<Digest, BlockId> by_key_;
};

// Keys of the full blocks of `tokens`: key[i] = SHA-256(key[i-1] or root, tokens of block i).
// root = SHA-256(variant content digest, salt).
Digest prefix_root(const Digest& variant_content, std::span<const std::byte> salt);
Digest next_prefix_key(const Digest& previous, std::span<const std::int32_t> block_tokens);

}  // namespace deltazip
