#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "deltazip/backend/backend.h"
#include "deltazip/delta/delta_cache.h"
#include "deltazip/io/checkpoint.h"
#include "deltazip/model/config.h"

namespace deltazip {

// The KV cache's bytes: per layer keys and values, [num_blocks, num_kv_heads, block_size,
// head_dim].
class KvCache {
 public:
  KvCache(Backend& backend, const ModelConfig& config, DType dtype, std::int32_t num_blocks,
          std::int32_t block_size);
  static std::size_t bytes_per_block(const ModelConfig& config, DType dtype,
                                     std::int32_t block_size);
  const KvLayer& layer(std::int32_t index) const {
    return layers_[static_cast<std::size_t>(index)];
  }
  void copy_block(Backend& backend, std::int32_t from, std::int32_t to, Stream& stream);

 private:
  std::vector<KvLayer> layers_;
  std::vector<Buffer> buffers_;
};

// One variant's tensors resolved to pointers, so that a step looks nothing up by name.
struct VariantWeights;

// Rows [first_row, first_row + num_rows) of the batch belong to one variant.
struct Segment {
  const VariantWeights* variant = nullptr;
  std::int32_t first_row = 0, num_rows = 0;
};

// One step's input, host memory. Rows are grouped by segment; a sequence's rows are neighbours.
struct Batch {
  std::vector<std::int32_t> tokens;        // [num_rows]; t < 0 stands for Model::sampled()[~t]
  std::vector<std::int32_t> positions;     // [num_rows]
  std::vector<std::int64_t> cache_slots;   // [num_rows]
  std::vector<std::int32_t> rope_lengths;  // [num_rows]: length the dynamic RoPE scales for
  std::vector<Segment> segments;           // sorted by first_row, cover all rows
  std::vector<AttentionSequence> sequences;
  std::vector<std::int32_t> logit_rows;  // rows whose logits are wanted, ascending

  void clear();  // keeps the memory
};

// What a model makes room for.
struct ModelSizes {
  std::int32_t max_batch_tokens = 0;
  std::int32_t max_logit_rows = 0;  // rows of one step whose logits are wanted
  std::int64_t max_length = 0;      // positions are below it; 0: config.max_length()
};

struct ModelBytes {
  std::size_t weights = 0;
  std::size_t scratch = 0;  // activations, logits, angles
};

// The Llama decoder, written once over Ops. Base weights live here; deltas come with the batch.
// Engine thread, except bind().
class Model {
 public:
  // Packs the weights layer by layer; `checkpoint` may be closed afterwards. Throws InvalidArgument
  // if weights and config disagree.
  Model(Backend& backend, const Checkpoint& checkpoint, const ModelConfig& config,
        const ModelSizes& sizes);
  ~Model();

  const ModelConfig& config() const;
  std::size_t weight_bytes() const;   // on the device
  std::size_t scratch_bytes() const;  // allocated at construction

  // What the constructor would allocate on the device. Throws as it does.
  static ModelBytes measure(Backend& backend, const Checkpoint& checkpoint,
                            const ModelConfig& config, const ModelSizes& sizes);

  // Names and shapes every delta must cover: the checkpoint's tensors.
  static std::vector<BaseTensor> base_tensors(const Checkpoint& checkpoint);
  const VariantWeights* base() const;
  // Throws InvalidArgument if a part has a kind this model cannot serve (e.g. a replaced matrix).
  static void check_servable(const ModelConfig& config, const DeltaFile& file);
  // Any thread. The result points into `delta`, which must outlive it.
  std::shared_ptr<const VariantWeights> bind(const DeviceDelta& delta) const;

  // Returns logits, float32 [logit_rows, vocab_size] on the device, valid until the next call.
  // `batch` is read before this returns. The device may still be at work on the call before, not on
  // one before that, and in the same stream. A decode step (one row each, all logits wanted) is
  // padded to one of the backend's sizes.
  ConstTensorView forward(const Batch& batch, KvCache& cache, Stream& stream);
  // On the device, [max_logit_rows]: where Ops::sample puts the tokens that the next step's batch
  // may name before the host knows them.
  std::span<std::int32_t> sampled() const;

  // Steps without content, so that what a device makes or measures at first use is there before
  // the first request. A decode of `num_rows` with room for the deltas of `num_variants` runs as
  // often as it takes to record it. Waits for the stream.
  void rehearse_decode(std::int32_t num_rows, std::int32_t num_variants, KvCache& cache,
                       Stream& stream);
  ConstTensorView rehearse_prefill(std::int32_t num_rows, KvCache& cache, Stream& stream);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltazip
