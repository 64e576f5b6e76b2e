#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "deltazip/engine/engine.h"

namespace deltazip::bindings {

void bind_config(pybind11::module_& module) {
  using C = EngineConfig;
  Fields<C>(module, "EngineConfig", "What an engine is built from; 0 and \"auto\": it chooses.")
      .field("base", &C::base)
      .field("base_name", &C::base_name)
      .field("device", &C::device)
      .field("num_threads", &C::num_threads)
      .field("dtype", &C::dtype)
      .field("kv_dtype", &C::kv_dtype)
      .field("kv_cache_bytes", &C::kv_cache_bytes)
      .field("memory_budget_bytes", &C::memory_budget_bytes)
      .field("delta_budget_bytes", &C::delta_budget_bytes)
      .field("host_budget_bytes", &C::host_budget_bytes)
      .field("num_delta_slots", &C::num_delta_slots)
      .field("block_size", &C::block_size)
      .field("max_batch_tokens", &C::max_batch_tokens)
      .field("max_batch_sequences", &C::max_batch_sequences)
      .field("max_variants_per_batch", &C::max_variants_per_batch)
      .field("prefill_chunk_tokens", &C::prefill_chunk_tokens)
      .field("max_waiting", &C::max_waiting)
      .field("max_model_len", &C::max_model_len)
      .field("max_variant_wait_steps", &C::max_variant_wait_steps)
      .field("prefix_caching", &C::prefix_caching)
      .field("warm_up", &C::warm_up);
}

}  // namespace deltazip::bindings
