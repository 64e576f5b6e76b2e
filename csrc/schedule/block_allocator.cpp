#include "deltazip/schedule/block_allocator.h"

#include <bit>

#include "deltazip/base/error.h"

namespace deltazip {

static_assert(std::endian::native == std::endian::little, "prefix keys hash tokens as stored");

BlockAllocator::BlockAllocator(std::int32_t num_blocks) {
  DZ_CHECK(num_blocks > 0, "the KV cache needs at least one block, got ", num_blocks);
  blocks_.resize(static_cast<std::size_t>(num_blocks));
  unkeyed_.reserve(blocks_.size());
  for (BlockId block = num_blocks - 1; block >= 0; --block) unkeyed_.push_back(block);
  by_key_.reserve(blocks_.size());
}

BlockAllocator::Block& BlockAllocator::at(BlockId block) {
  DZ_INTERNAL(block >= 0 && block < num_blocks(), "block ", block, " of ", num_blocks());
  return blocks_[static_cast<std::size_t>(block)];
}

const BlockAllocator::Block& BlockAllocator::at(BlockId block) const {
  DZ_INTERNAL(block >= 0 && block < num_blocks(), "block ", block, " of ", num_blocks());
  return blocks_[static_cast<std::size_t>(block)];
}

void BlockAllocator::push_idle(BlockId block) {
  Block& entry = at(block);
  entry.older = newest_idle_;
  entry.newer = -1;
  if (newest_idle_ >= 0) {
    at(newest_idle_).newer = block;
  } else {
    oldest_idle_ = block;
  }
  newest_idle_ = block;
  ++num_idle_;
}

void BlockAllocator::remove_idle(BlockId block) {
  const Block& entry = at(block);
  (entry.older >= 0 ? at(entry.older).newer : oldest_idle_) = entry.newer;
  (entry.newer >= 0 ? at(entry.newer).older : newest_idle_) = entry.older;
  --num_idle_;
}

std::optional<BlockId> BlockAllocator::allocate() {
  BlockId block = -1;
  if (!unkeyed_.empty()) {
    block = unkeyed_.back();
    unkeyed_.pop_back();
  } else if (oldest_idle_ >= 0) {
    block = oldest_idle_;
    remove_idle(block);
    by_key_.erase(at(block).key);
    at(block).has_key = false;
  } else {
    return std::nullopt;
  }
  at(block).num_owners = 1;
  return block;
}

void BlockAllocator::share(BlockId block) {
  DZ_INTERNAL(at(block).num_owners > 0, "block ", block, " is shared but has no owner");
  ++at(block).num_owners;
}

void BlockAllocator::release(BlockId block) {
  Block& entry = at(block);
  DZ_INTERNAL(entry.num_owners > 0, "block ", block, " is released but has no owner");
  if (--entry.num_owners > 0) return;
  if (entry.has_key) {
    push_idle(block);
  } else {
    unkeyed_.push_back(block);
  }
}

std::int32_t BlockAllocator::num_owners(BlockId block) const { return at(block).num_owners; }

void BlockAllocator::publish(BlockId block, const Digest& key) {
  Block& entry = at(block);
  DZ_INTERNAL(entry.num_owners > 0, "block ", block, " is published but has no owner");
  if (entry.has_key) {
    DZ_INTERNAL(entry.key == key, "block ", block, " is published under two keys");
    return;
  }
  if (!by_key_.emplace(key, block).second) return;
  entry.key = key;
  entry.has_key = true;
}

std::optional<BlockId> BlockAllocator::acquire(const Digest& key) {
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) return std::nullopt;
  Block& entry = at(found->second);
  if (entry.num_owners == 0) remove_idle(found->second);
  ++entry.num_owners;
  return found->second;
}

bool BlockAllocator::contains(const Digest& key) const { return by_key_.contains(key); }

std::int32_t BlockAllocator::num_blocks() const {
  return static_cast<std::int32_t>(blocks_.size());
}

std::int32_t BlockAllocator::num_free() const {
  return static_cast<std::int32_t>(unkeyed_.size()) + num_idle_;
}

void BlockAllocator::check() const {
  std::vector<bool> is_free(blocks_.size(), false);
  for (const BlockId block : unkeyed_) {
    DZ_INTERNAL(at(block).num_owners == 0 && !at(block).has_key, "block ", block,
                " is listed free with ", at(block).num_owners, " owners");
    DZ_INTERNAL(!is_free[static_cast<std::size_t>(block)], "block ", block, " is free twice");
    is_free[static_cast<std::size_t>(block)] = true;
  }
  std::int32_t num_idle = 0;
  BlockId previous = -1;
  for (BlockId block = oldest_idle_; block >= 0; block = at(block).newer) {
    DZ_INTERNAL(at(block).older == previous, "idle block ", block, " has a broken link");
    DZ_INTERNAL(at(block).num_owners == 0 && at(block).has_key, "block ", block,
                " is listed idle with ", at(block).num_owners, " owners");
    DZ_INTERNAL(!is_free[static_cast<std::size_t>(block)], "block ", block, " is free twice");
    is_free[static_cast<std::size_t>(block)] = true;
    previous = block;
    ++num_idle;
  }
  DZ_INTERNAL(num_idle == num_idle_ && previous == newest_idle_, "the idle list has ", num_idle,
              " blocks, not ", num_idle_);
  std::size_t num_keyed = 0;
  for (BlockId block = 0; block < num_blocks(); ++block) {
    const Block& entry = at(block);
    DZ_INTERNAL((entry.num_owners == 0) == is_free[static_cast<std::size_t>(block)], "block ",
                block, " with ", entry.num_owners, " owners is lost or listed free");
    if (!entry.has_key) continue;
    ++num_keyed;
    const auto found = by_key_.find(entry.key);
    DZ_INTERNAL(found != by_key_.end() && found->second == block, "block ", block,
                " is not found by its key");
  }
  DZ_INTERNAL(num_keyed == by_key_.size(), by_key_.size(), " keys for ", num_keyed, " blocks");
}

Digest prefix_root(const Digest& variant_content, std::span<const std::byte> salt) {
  return Sha256().update(std::as_bytes(std::span(variant_content.bytes))).update(salt).finish();
}

Digest next_prefix_key(const Digest& previous, std::span<const std::int32_t> block_tokens) {
  return Sha256()
      .update(std::as_bytes(std::span(previous.bytes)))
      .update(std::as_bytes(block_tokens))
      .finish();
}

}  // namespace deltazip
