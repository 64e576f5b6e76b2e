#include "deltazip/base/error.h"
#include "deltazip/model/model.h"

namespace deltazip {
namespace {

// Keys or values of one block of one layer.
std::size_t half_block_bytes(const ModelConfig& config, DType dtype, std::int32_t block_size) {
  return static_cast<std::size_t>(config.num_kv_heads) * static_cast<std::size_t>(block_size) *
         static_cast<std::size_t>(config.head_dim) * size_of(dtype);
}

}  // namespace

std::size_t KvCache::bytes_per_block(const ModelConfig& config, DType dtype,
                                     std::int32_t block_size) {
  return 2 * static_cast<std::size_t>(config.num_layers) *
         half_block_bytes(config, dtype, block_size);
}

KvCache::KvCache(Backend& backend, const ModelConfig& config, DType dtype, std::int32_t num_blocks,
                 std::int32_t block_size) {
  DZ_CHECK(is_floating(dtype), "KvCache: dtype must be floating, got ", name(dtype));
  DZ_CHECK(num_blocks > 0 && block_size > 0, "KvCache: expected blocks of some positions, got ",
           num_blocks, " blocks of ", block_size);
  const std::size_t bytes =
      static_cast<std::size_t>(num_blocks) * half_block_bytes(config, dtype, block_size);
  for (std::int32_t i = 0; i < config.num_layers; ++i) {
    KvLayer layer;
    layer.keys = buffers_.emplace_back(backend.allocate(bytes)).data();
    layer.values = buffers_.emplace_back(backend.allocate(bytes)).data();
    layer.num_blocks = num_blocks;
    layer.num_kv_heads = config.num_kv_heads;
    layer.block_size = block_size;
    layer.head_dim = config.head_dim;
    layer.dtype = dtype;
    layers_.push_back(layer);
  }
}

void KvCache::copy_block(Backend& backend, std::int32_t from, std::int32_t to, Stream& stream) {
  const std::int32_t num_blocks = layers_.front().num_blocks;
  DZ_CHECK(from >= 0 && from < num_blocks && to >= 0 && to < num_blocks,
           "KvCache: blocks are 0 to ", num_blocks - 1, ", got a copy from ", from, " to ", to);
  if (from == to) return;
  for (const KvLayer& layer : layers_) {
    const std::size_t bytes = static_cast<std::size_t>(layer.num_kv_heads) *
                              static_cast<std::size_t>(layer.block_size) *
                              static_cast<std::size_t>(layer.head_dim) * size_of(layer.dtype);
    const auto copy = [&](void* memory) {
      auto* base = static_cast<std::byte*>(memory);
      backend.copy_on_device(base + static_cast<std::size_t>(to) * bytes,
                             base + static_cast<std::size_t>(from) * bytes, bytes, stream);
    };
    copy(layer.keys);
    copy(layer.values);
  }
}

}  // namespace deltazip
