#include "deltazip/schedule/block_allocator.h"

#include <gtest/gtest.h>

#include <list>
#include <map>
#include <random>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

Digest key_of(std::int32_t number) { return next_prefix_key(Digest{}, std::array{number}); }

// The same ledger, written as plainly as possible.
struct Model {
  std::map<BlockId, int> owners;
  std::map<BlockId, std::int32_t> key;  // numbers, not digests
  std::list<BlockId> idle;              // oldest first

  std::optional<BlockId> holder(std::int32_t number) const {
    for (const auto& [block, held] : key) {
      if (held == number) return block;
    }
    return std::nullopt;
  }
};

TEST(BlockAllocator, RandomWalkMatchesThePlainModel) {
  std::mt19937 rng(1);
  for (const std::int32_t num_blocks : {1, 2, 5, 24}) {
    BlockAllocator allocator(num_blocks);
    Model model;
    const auto draw = [&](std::int32_t n) { return static_cast<std::int32_t>(rng() % n); };
    const auto any_owned = [&]() -> BlockId {
      if (model.owners.empty()) return -1;
      return std::next(model.owners.begin(), draw(static_cast<int>(model.owners.size())))->first;
    };
    for (int i = 0; i < 20000; ++i) {
      const int action = draw(6);
      const BlockId owned = any_owned();
      if (action == 0) {
        const auto block = allocator.allocate();
        const auto num_owned = static_cast<std::int32_t>(model.owners.size());
        ASSERT_EQ(block.has_value(), num_owned < num_blocks);
        if (!block) continue;
        ASSERT_FALSE(model.owners.contains(*block));
        const auto num_idle = static_cast<std::int32_t>(model.idle.size());
        if (num_owned + num_idle == num_blocks) {  // nothing but cached blocks left: the oldest
          ASSERT_EQ(*block, model.idle.front());
          model.idle.pop_front();
          model.key.erase(*block);
        } else {
          ASSERT_FALSE(model.key.contains(*block));
        }
        model.owners[*block] = 1;
      } else if (action == 1 && owned >= 0) {
        allocator.share(owned);
        ++model.owners[owned];
      } else if (action == 2 && owned >= 0) {
        allocator.release(owned);
        if (--model.owners[owned] == 0) {
          model.owners.erase(owned);
          if (model.key.contains(owned)) model.idle.push_back(owned);
        }
      } else if (action == 3 && owned >= 0 && !model.key.contains(owned)) {
        const std::int32_t number = draw(40);
        allocator.publish(owned, key_of(number));
        if (!model.holder(number)) model.key[owned] = number;
      } else if (action >= 4) {
        const std::int32_t number = draw(40);
        const auto expected = model.holder(number);
        ASSERT_EQ(allocator.contains(key_of(number)), expected.has_value());
        ASSERT_EQ(allocator.acquire(key_of(number)), expected);
        if (expected) {
          if (++model.owners[*expected] == 1) model.idle.remove(*expected);
        }
      }
      allocator.check();
      ASSERT_EQ(allocator.num_free(), num_blocks - static_cast<int>(model.owners.size()));
      for (const auto& [block, owners] : model.owners) {
        ASSERT_EQ(allocator.num_owners(block), owners);
      }
    }
  }
}

TEST(BlockAllocator, MisuseIsAnError) {
  EXPECT_THROW(BlockAllocator(0), InvalidArgument);
  BlockAllocator allocator(2);
  EXPECT_THROW(allocator.release(0), InternalError);
  EXPECT_THROW(allocator.share(1), InternalError);
  EXPECT_THROW(allocator.share(2), InternalError);
  EXPECT_THROW(allocator.publish(0, key_of(1)), InternalError);
  const BlockId block = *allocator.allocate();
  allocator.publish(block, key_of(1));
  allocator.publish(block, key_of(1));
  EXPECT_THROW(allocator.publish(block, key_of(2)), InternalError);
  allocator.check();
}

TEST(PrefixKeys, DependOnVariantSaltAndEveryTokenBefore) {
  const Digest content = sha256({});
  const std::array<std::byte, 3> salt{std::byte{1}, std::byte{2}, std::byte{3}};
  const Digest root = prefix_root(content, {});
  EXPECT_NE(root, prefix_root(content, salt));
  EXPECT_NE(root, prefix_root(root, {}));
  const std::array a{1, 2, 3, 4}, b{1, 2, 3, 5};
  EXPECT_EQ(next_prefix_key(root, a), next_prefix_key(root, a));
  EXPECT_NE(next_prefix_key(root, a), next_prefix_key(root, b));
  EXPECT_NE(next_prefix_key(next_prefix_key(root, a), b),
            next_prefix_key(next_prefix_key(root, b), b));
}

}  // namespace
}  // namespace deltazip
