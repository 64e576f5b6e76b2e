#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "deltazip/backend/backend.h"
#include "deltazip/io/checkpoint.h"
#include "deltazip/model/config.h"
#include "deltazip/model/model.h"

namespace deltazip {

// What a variant has of one layer. Pointers are the device's; a matrix without data is unchanged.
struct VariantLayer {
  const float* input_norm = nullptr;           // [hidden_size]
  const float* post_attention_norm = nullptr;  // [hidden_size]
  const float* qkv_bias = nullptr;             // [q_size + 2 * kv_size], nullptr: none
  const float* o_bias = nullptr;               // [hidden_size]
  const float* gate_up_bias = nullptr;         // [2 * intermediate_size]
  const float* down_bias = nullptr;            // [hidden_size]
  DeltaMatrix q, k, v, o, gate, up, down;
};

struct VariantWeights {
  std::uint64_t id = 0;  // never used twice by one model, unlike an address; 0: the base
  std::vector<VariantLayer> layers;
  const float* final_norm = nullptr;  // [hidden_size]
  DeltaMatrix embedding, lm_head;
  std::vector<Buffer> buffers;            // biases put side by side as the fused products need them
  std::shared_ptr<const HostDelta> host;  // where the device reads the host's memory
};

struct BaseLayer {
  PackedMatrix qkv;      // [q_size + 2 * kv_size, hidden_size]
  PackedMatrix o;        // [hidden_size, q_size]
  PackedMatrix gate_up;  // [2 * intermediate_size, hidden_size]
  PackedMatrix down;     // [hidden_size, intermediate_size]
};

// The base's weights on the device: matrices packed, vectors as float32.
struct BaseWeights {
  std::vector<BaseLayer> layers;
  PackedMatrix embedding, lm_head;  // the same when they are one table
  bool lm_head_is_embedding = false;
  VariantWeights variant;  // the base seen as a variant: its vectors, no deltas
  std::vector<Buffer> buffers;
  std::size_t num_bytes = 0;
};

// Throws InvalidArgument if the checkpoint does not match the config. `measures_only`: nothing is
// read or allocated, num_bytes says what would be.
BaseWeights load_base_weights(Backend& backend, const Checkpoint& checkpoint,
                              const ModelConfig& config, bool measures_only);

}  // namespace deltazip
