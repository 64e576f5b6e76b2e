#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "deltazip/delta/delta_cache.h"
#include "deltazip/delta/delta_store.h"
#include "deltazip/engine/engine.h"
#include "deltazip/model/model.h"
#include "engine/variant_record.h"

namespace deltazip::engine {

// All that holds bytes: the device, the base's weights, the KV cache, the deltas. Built once, in
// the order in which the parts need one another. After construction the store and `config` may be
// used by any thread, the rest belongs to the engine's.
struct Resources {
  // Throws InvalidArgument: a number out of range, a folder that cannot be served, or a budget too
  // small. Throws ResourceExhausted if the device refuses what was planned. Logs the capacity
  // table. `device` nullptr: made as the config says.
  Resources(const EngineConfig& requested, const LogSink& log,
            std::unique_ptr<Backend> device = nullptr);

  // Validates the delta at `path` against the base, entirely. Any thread.
  std::shared_ptr<VariantRecord> open_variant(const std::string& name, const std::string& path);
  std::shared_ptr<VariantRecord> base_record() const;
  SchedulerConfig scheduler_config() const;

  EngineConfig config;  // every 0 and "auto" resolved
  std::unique_ptr<Backend> backend;
  std::string config_json;
  ModelConfig model_config;
  Digest base_digest;
  std::unique_ptr<Model> model;
  std::int32_t num_blocks = 0;
  std::vector<CapacityRow> capacity;
  std::unique_ptr<KvCache> kv;
  std::unique_ptr<DeltaStore> store;
  std::unique_ptr<DeltaCache> deltas;
};

void check_prefill_chunk_tokens(std::int32_t num_tokens);

}  // namespace deltazip::engine
