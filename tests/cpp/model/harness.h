#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/device_memory.h"
#include "deltazip/backend/backend.h"
#include "deltazip/model/model.h"

namespace deltazip::test {

// What the engine is to a model, at its least: sequences with block tables, one step at a time.
class Harness {
 public:
  struct Options {
    std::string device = "cpu";
    BackendOptions backend;
    std::int32_t max_batch_tokens = 64, num_blocks = 64, block_size = 4;
    DType kv_dtype = DType::kFloat32;
    std::int64_t max_length = 0;
  };

  // Tokens to append to a sequence, and the length its dynamic RoPE sees (0: its own).
  struct Chunk {
    std::int32_t sequence;
    std::vector<std::int32_t> tokens;
    std::int32_t rope_length = 0;
  };

  Harness(const std::filesystem::path& folder, const Options& options)
      : Harness(folder, options, make_backend(options.device, options.backend)) {}
  Harness(const std::filesystem::path& folder, const Options& options,
          std::unique_ptr<Backend> backend)
      : backend_(std::move(backend)),
        stream_(backend_->create_stream()),
        checkpoint_(Checkpoint::open(folder)),
        model_(*backend_, checkpoint_, ModelConfig::parse(checkpoint_.config_json()),
               {options.max_batch_tokens, options.max_batch_tokens, options.max_length}),
        cache_(*backend_, model_.config(), options.kv_dtype, options.num_blocks,
               options.block_size),
        block_size_(options.block_size),
        free_(static_cast<std::size_t>(options.num_blocks)) {
    std::iota(free_.begin(), free_.end(), 0);
    std::shuffle(free_.begin(), free_.end(), std::mt19937(7));
    poison(options);
  }

  Backend& backend() { return *backend_; }
  Model& model() { return model_; }
  KvCache& cache() { return cache_; }
  Stream& stream() { return *stream_; }

  std::int32_t add_sequence(const VariantWeights* variant = nullptr) {
    sequences_.push_back({variant == nullptr ? model_.base() : variant, 0, {}});
    return static_cast<std::int32_t>(sequences_.size()) - 1;
  }
  void truncate(std::int32_t sequence, std::int32_t length) { at(sequence).length = length; }
  const std::vector<std::int32_t>& blocks(std::int32_t sequence) { return at(sequence).blocks; }

  // Logits of every row of each chunk, or of each chunk's last row: [rows, vocab_size].
  // Neighbouring chunks of one variant share a segment.
  std::vector<std::vector<float>> step(const std::vector<Chunk>& chunks, bool last_rows = false) {
    Batch batch;
    std::vector<std::size_t> rows_of_chunk;
    for (const Chunk& chunk : chunks) append(batch, chunk, last_rows, rows_of_chunk);
    const ConstTensorView logits = model_.forward(batch, cache_, *stream_);
    stream_->synchronize();
    const auto vocab = static_cast<std::size_t>(model_.config().vocab_size);
    std::vector<std::vector<float>> out;
    std::vector<std::byte> bytes(logits.num_bytes());
    backend_->copy_to_host(bytes.data(), logits.data, bytes.size(), *stream_);
    stream_->synchronize();
    const std::vector<float> all = testing::to_floats(bytes, logits.dtype);
    const float* from = all.data();
    for (const std::size_t rows : rows_of_chunk) {
      out.emplace_back(from, from + rows * vocab);
      from += rows * vocab;
    }
    return out;
  }

  // One sequence from the start, in chunks of at most `chunk` rows: [tokens, vocab_size].
  std::vector<float> run(const std::vector<std::int32_t>& tokens, std::size_t chunk,
                         const VariantWeights* variant = nullptr) {
    const std::int32_t id = add_sequence(variant);
    std::vector<float> out;
    for (std::size_t begin = 0; begin < tokens.size(); begin += chunk) {
      const std::size_t end = std::min(tokens.size(), begin + chunk);
      const auto at_begin = tokens.begin() + static_cast<std::ptrdiff_t>(begin);
      const auto at_end = tokens.begin() + static_cast<std::ptrdiff_t>(end);
      const std::vector<float> part =
          step({{id, {at_begin, at_end}, static_cast<std::int32_t>(tokens.size())}})[0];
      out.insert(out.end(), part.begin(), part.end());
    }
    release(id);
    return out;
  }

  void release(std::int32_t sequence) {
    free_.insert(free_.end(), at(sequence).blocks.begin(), at(sequence).blocks.end());
    at(sequence).blocks.clear();
  }

 private:
  struct Sequence {
    const VariantWeights* variant;
    std::int32_t length;
    std::vector<std::int32_t> blocks;
  };

  Sequence& at(std::int32_t id) { return sequences_[static_cast<std::size_t>(id)]; }

  void append(Batch& batch, const Chunk& chunk, bool last_row_only,
              std::vector<std::size_t>& rows_of_chunk) {
    Sequence& sequence = at(chunk.sequence);
    const auto first_row = static_cast<std::int32_t>(batch.tokens.size());
    const auto num_rows = static_cast<std::int32_t>(chunk.tokens.size());
    const std::int32_t length = sequence.length + num_rows;
    while (static_cast<std::int32_t>(sequence.blocks.size()) * block_size_ < length) {
      sequence.blocks.push_back(free_.back());
      free_.pop_back();
    }
    for (std::int32_t i = 0; i < num_rows; ++i) {
      const std::int32_t position = sequence.length + i;
      const std::int64_t block = sequence.blocks[static_cast<std::size_t>(position / block_size_)];
      batch.tokens.push_back(chunk.tokens[static_cast<std::size_t>(i)]);
      batch.positions.push_back(position);
      batch.cache_slots.push_back(block * block_size_ + position % block_size_);
      batch.rope_lengths.push_back(std::max(chunk.rope_length, length));
      if (!last_row_only || i + 1 == num_rows) batch.logit_rows.push_back(first_row + i);
    }
    if (!batch.segments.empty() && batch.segments.back().variant == sequence.variant) {
      batch.segments.back().num_rows += num_rows;
    } else {
      batch.segments.push_back({sequence.variant, first_row, num_rows});
    }
    batch.sequences.push_back({first_row, num_rows, length, sequence.blocks.data()});
    rows_of_chunk.push_back(last_row_only ? 1 : static_cast<std::size_t>(num_rows));
    sequence.length = length;
  }

  // Nothing may be read from the cache that was not written.
  void poison(const Options& options) {
    const std::size_t bytes =
        KvCache::bytes_per_block(model_.config(), options.kv_dtype, options.block_size) /
        static_cast<std::size_t>(2 * model_.config().num_layers) *
        static_cast<std::size_t>(options.num_blocks);
    const std::vector<std::uint8_t> nans(bytes, 0xFF);
    for (std::int32_t i = 0; i < model_.config().num_layers; ++i) {
      backend_->copy_to_device(cache_.layer(i).keys, nans.data(), bytes, *stream_);
      backend_->copy_to_device(cache_.layer(i).values, nans.data(), bytes, *stream_);
      stream_->synchronize();
    }
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Stream> stream_;
  Checkpoint checkpoint_;
  Model model_;
  KvCache cache_;
  std::int32_t block_size_;
  std::vector<std::int32_t> free_;
  std::vector<Sequence> sequences_;
};

}  // namespace deltazip::test
