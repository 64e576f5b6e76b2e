#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "deltazip/base/error.h"
#include "deltazip/model/model.h"
#include "model/tiny_model.h"

namespace deltazip {
namespace {

TEST(KvCache, CopiesKeysAndValuesOfEveryLayerAndNothingElse) {
  const std::unique_ptr<Backend> backend = make_backend("cpu");
  const std::unique_ptr<Stream> stream = backend->create_stream();
  const ModelConfig config = test::make_tiny_model(R"({"num_hidden_layers": 3})", 1).config;
  KvCache cache(*backend, config, DType::kBFloat16, 4, 8);
  EXPECT_EQ(KvCache::bytes_per_block(config, DType::kBFloat16, 8), 3U * 2 * 2 * 8 * 8 * 2);

  const std::size_t block_bytes = 2 * 8 * 8 * 2;
  const auto all = [&](void* memory, auto action) {
    std::vector<std::uint8_t> host(4 * block_bytes);
    backend->copy_to_host(host.data(), memory, host.size(), *stream);
    stream->synchronize();
    action(host);
    backend->copy_to_device(memory, host.data(), host.size(), *stream);
    stream->synchronize();
  };
  const auto value = [](std::int32_t layer, int half, std::size_t block) {
    return static_cast<std::uint8_t>(1 + layer * 8 + half * 4 + static_cast<int>(block));
  };
  for (std::int32_t layer = 0; layer < 3; ++layer) {
    for (int half = 0; half < 2; ++half) {
      all(half == 0 ? cache.layer(layer).keys : cache.layer(layer).values, [&](auto& host) {
        for (std::size_t block = 0; block < 4; ++block) {
          std::memset(host.data() + block * block_bytes, value(layer, half, block), block_bytes);
        }
      });
    }
  }
  cache.copy_block(*backend, 3, 1, *stream);
  for (std::int32_t layer = 0; layer < 3; ++layer) {
    for (int half = 0; half < 2; ++half) {
      all(half == 0 ? cache.layer(layer).keys : cache.layer(layer).values, [&](auto& host) {
        for (std::size_t i = 0; i < host.size(); ++i) {
          const std::size_t block = i / block_bytes;
          ASSERT_EQ(host[i], value(layer, half, block == 1 ? 3 : block)) << layer << " " << i;
        }
      });
    }
  }
  EXPECT_THROW(cache.copy_block(*backend, 4, 1, *stream), InvalidArgument);
  EXPECT_THROW(cache.copy_block(*backend, 0, -1, *stream), InvalidArgument);
  EXPECT_THROW(KvCache(*backend, config, DType::kInt32, 4, 8), InvalidArgument);
}

}  // namespace
}  // namespace deltazip
