#include "engine/resources.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <utility>

#include "deltazip/base/thread_pool.h"
#include "deltazip/io/checkpoint.h"
#include "deltazip/io/json_text.h"
#include "engine/memory_plan.h"
#include "engine/warm_up.h"

namespace deltazip::engine {
namespace {

namespace fs = std::filesystem;

// More would contend with the engine's own thread and the server.
constexpr int kTilingThreads = 8;
constexpr std::size_t kMaxGenerationConfigBytes = 1u << 20;

template <typename T>
void check_range(const char* what, T value, std::int64_t low, std::int64_t high) {
  DZ_CHECK(value >= low && value <= high, what, " must be in [", low, ", ", high, "], got ", value);
}

void check_config(const EngineConfig& config) {
  constexpr std::int64_t kMaxBytes = std::int64_t{1} << 50;
  DZ_CHECK(!config.base.empty(), "base must name a folder, got ''");
  check_range("num_threads", config.num_threads, 0, 1024);
  check_range("kv_cache_bytes", config.kv_cache_bytes, 0, kMaxBytes);
  check_range("memory_budget_bytes", config.memory_budget_bytes, 0, kMaxBytes);
  check_range("delta_budget_bytes", config.delta_budget_bytes, 0, kMaxBytes);
  check_range("host_budget_bytes", config.host_budget_bytes, 0, kMaxBytes);
  check_range("num_delta_slots", config.num_delta_slots, 0, 4096);
  check_range("block_size", config.block_size, 1, 1024);
  check_range("max_batch_tokens", config.max_batch_tokens, 0, 1 << 17);
  check_range("max_batch_sequences", config.max_batch_sequences, 0, 1 << 16);
  check_range("max_variants_per_batch", config.max_variants_per_batch, 0, 4096);
  check_prefill_chunk_tokens(config.prefill_chunk_tokens);
  check_range("max_waiting", config.max_waiting, 1, 1 << 24);
  check_range("max_model_len", config.max_model_len, 0, 1 << 28);
  check_range("max_variant_wait_steps", config.max_variant_wait_steps, 1, 1 << 24);
}

// A folder's name made fit to be a variant's.
std::string name_from_folder(const std::string& folder) {
  std::error_code error;
  const fs::path path = fs::weakly_canonical(folder, error);
  std::string name = path.has_filename() ? path.filename().string() : "base";
  for (char& c : name) {
    const bool is_plain = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
                          (c >= '0' && c <= '9') || c == '.' || c == '_' || c == ':' || c == '@';
    if (!is_plain) c = '-';
  }
  if (name.empty() || name.front() == '.') name.insert(0, 1, '-');
  return name.substr(0, 128);
}

// The config with the eos tokens that `folder`'s generation_config.json names, where there is one.
ModelConfig with_generation_config(ModelConfig config, const fs::path& folder) {
  const fs::path path = folder / "generation_config.json";
  std::error_code error;
  if (!fs::exists(path, error)) return config;
  const std::string text = read_text_file(path, kMaxGenerationConfigBytes);
  check_json_object(text, path.string());
  config.apply_generation_config(text);
  return config;
}

// What a variant takes in a slot if its matrices have one type and its tables (embedding, lm_head)
// another: an estimate for the budget only.
std::int64_t delta_bytes(const Backend& backend, const std::vector<BaseTensor>& tensors,
                         DeltaType matrix_type, DeltaType table_type) {
  constexpr std::int32_t kGroupSize = 32;  // the finest a file may have
  constexpr std::size_t kAlignment = 64;
  std::size_t num_bytes = 0;
  for (const BaseTensor& tensor : tensors) {
    if (tensor.shape.rank() != 2) {
      num_bytes += static_cast<std::size_t>(tensor.shape.num_elements()) * sizeof(float);
    } else {
      const bool is_table = tensor.name.find("embed_tokens") != std::string::npos ||
                            tensor.name.find("lm_head") != std::string::npos;
      num_bytes += backend.tiled_bytes(is_table ? table_type : matrix_type, tensor.shape[0],
                                       tensor.shape[1], kGroupSize);
    }
    num_bytes += kAlignment;
  }
  return static_cast<std::int64_t>(num_bytes);
}

// What a device computes in.
DType compute_dtype(const EngineConfig& config, DType checkpoint, const LogSink& log) {
  const bool is_cpu = config.device == "cpu";
  const auto dtype = dtype_from_name(config.dtype);
  if (is_cpu) {
    DZ_CHECK(config.dtype == "auto" || dtype == DType::kFloat32,
             "dtype must be auto or float32 on the CPU, which computes in float32, got '",
             config.dtype, "'");
    return DType::kFloat32;
  }
  if (config.dtype != "auto") {
    DZ_CHECK(dtype == DType::kFloat16 || dtype == DType::kBFloat16,
             "dtype must be auto, float16 or bfloat16 on device '", config.device, "', got '",
             config.dtype, "'");
    return *dtype;
  }
  if (checkpoint != DType::kFloat32) return checkpoint;
  log(LogLevel::kInfo, "the base's weights are float32; the device computes in bfloat16");
  return DType::kBFloat16;
}

// Makes one part of the plan; a refusal says which part it was.
template <typename Make>
auto make_part(const char* what, const Make& make) {
  try {
    return make();
  } catch (const ResourceExhausted& error) {
    detail::fail<ResourceExhausted>("no memory for ", what,
                                    ", although it was in the plan: ", error.what(),
                                    "; lower memory_budget_bytes");
  }
}

}  // namespace

void check_prefill_chunk_tokens(std::int32_t num_tokens) {
  check_range("prefill_chunk_tokens", num_tokens, 0, 1 << 17);
}

Resources::Resources(const EngineConfig& requested, const LogSink& log,
                     std::unique_ptr<Backend> device)
    : config(requested) {
  check_config(config);
  if (config.base_name.empty()) config.base_name = name_from_folder(config.base);
  check_variant_name(config.base_name);

  ThreadPool pool(config.num_threads);
  config.num_threads = pool.num_threads();

  const Checkpoint checkpoint = Checkpoint::open(config.base);
  config_json = checkpoint.config_json();
  model_config = with_generation_config(ModelConfig::parse(config_json), checkpoint.folder());
  const std::int64_t model_max_len = model_config.max_length();
  DZ_CHECK(config.max_model_len <= model_max_len, "max_model_len is ", config.max_model_len,
           ", but the model's positions end at ", model_max_len);

  const DType compute = compute_dtype(config, model_config.dtype, log);
  backend =
      device ? std::move(device) : make_backend(config.device, {config.num_threads, {}, compute});
  const bool shares_host_memory = backend->shares_host_memory();
  config = resolve_batch_sizes(config, shares_host_memory);
  const DType activations = backend->activation_dtype(model_config.dtype);
  config.dtype = name(activations);
  if (config.kv_dtype == "auto") config.kv_dtype = name(activations);
  const auto kv_dtype = dtype_from_name(config.kv_dtype);
  DZ_CHECK(kv_dtype && is_floating(*kv_dtype),
           "kv_dtype must be auto, float32, float16 or bfloat16, got '", config.kv_dtype, "'");

  const std::vector<BaseTensor> tensors = Model::base_tensors(checkpoint);
  const ModelSizes sizes{config.max_batch_tokens, max_logit_rows(config), config.max_model_len};
  const ModelBytes bytes = Model::measure(*backend, checkpoint, model_config, sizes);
  MemoryNeeds needs;
  needs.free_memory = static_cast<std::int64_t>(backend->memory_info().free_bytes);
  needs.weights = static_cast<std::int64_t>(bytes.weights);
  needs.scratch = static_cast<std::int64_t>(bytes.scratch);
  needs.typical_delta =
      delta_bytes(*backend, tensors, DeltaType::kSparse24Int4, DeltaType::kDenseInt4);
  needs.largest_delta =
      delta_bytes(*backend, tensors, DeltaType::kDenseInt8, DeltaType::kDenseInt8);
  needs.kv_block = static_cast<std::int64_t>(
      KvCache::bytes_per_block(model_config, *kv_dtype, config.block_size));
  needs.model_max_len = static_cast<std::int32_t>(
      std::min<std::int64_t>(model_max_len, std::numeric_limits<std::int32_t>::max()));
  needs.max_logit_rows = sizes.max_logit_rows;
  needs.shares_host_memory = shares_host_memory;
  MemoryPlan plan = plan_memory(config, needs);
  config = plan.config;
  num_blocks = plan.num_blocks;
  capacity = std::move(plan.rows);
  backend->check_model({.cache = {nullptr, nullptr, num_blocks, model_config.num_kv_heads,
                                  config.block_size, model_config.head_dim, *kv_dtype},
                        .dtype = activations,
                        .vocab_size = model_config.vocab_size});

  // Nothing large is read or allocated before it is known to fit.
  base_digest = checkpoint.weights_digest(pool);
  model = make_part("the base's weights and scratch", [&] {
    return std::make_unique<Model>(*backend, checkpoint, model_config, sizes);
  });
  kv = make_part("the KV cache", [&] {
    return std::make_unique<KvCache>(*backend, model_config, *kv_dtype, num_blocks,
                                     config.block_size);
  });
  // Pinned memory cannot be swapped out: without a bound, many variants would end the process.
  if (!shares_host_memory && config.host_budget_bytes == 0) {
    const MemoryInfo host = make_backend("cpu", {1, {}})->memory_info();
    config.host_budget_bytes =
        std::max<std::int64_t>(1, static_cast<std::int64_t>(host.free_bytes / 2));
    log(LogLevel::kInfo, detail::concat("capacity: deltas in host memory: ",
                                        config.host_budget_bytes / (1 << 20), " MiB, pinned"));
  }
  // Beside a device the cores are free to tile; on the CPU they compute.
  const int tiling_threads = shares_host_memory ? 1 : std::min(config.num_threads, kTilingThreads);
  store = std::make_unique<DeltaStore>(*backend, base_digest, tensors,
                                       static_cast<std::size_t>(config.host_budget_bytes),
                                       tiling_threads);
  deltas = std::make_unique<DeltaCache>(*backend, *store, config.num_delta_slots);
  warm_up(*this, log);
}

std::shared_ptr<VariantRecord> Resources::base_record() const {
  auto record = std::make_shared<VariantRecord>();
  record->name = config.base_name;
  record->path = config.base;
  record->content_digest = base_digest;
  record->device_bytes = static_cast<std::int64_t>(model->weight_bytes());
  record->eos_token_ids = model_config.eos_token_ids;
  record->place = VariantRecord::Place::kResident;
  return record;
}

std::shared_ptr<VariantRecord> Resources::open_variant(const std::string& name,
                                                       const std::string& path) {
  DZ_CHECK(path.find('\0') == std::string::npos, "variant '", name, "': its path holds a NUL");
  auto record = std::make_shared<VariantRecord>();
  record->name = name;
  record->path = path;
  record->parent = config.base_name;
  std::error_code error;
  const bool is_folder = fs::is_directory(path, error);
  const fs::path folder = is_folder ? fs::path(path) : fs::path(path).parent_path();
  record->eos_token_ids = with_generation_config(model_config, folder).eos_token_ids;

  record->store_handle = store->add(path);
  try {
    Model::check_servable(model_config, *store->file(record->store_handle));
    const DeltaSummary& summary = store->summary(record->store_handle);
    record->content_digest = summary.content_digest;
    record->file_bytes = static_cast<std::int64_t>(summary.file_bytes);
    record->device_bytes = static_cast<std::int64_t>(summary.tiled_bytes);
    record->manifest_json = summary.manifest_json;
    DZ_CHECK(record->device_bytes <= config.delta_budget_bytes, "variant '", name, "' takes ",
             record->device_bytes, " bytes on the device, the delta slots have ",
             config.delta_budget_bytes, "; raise delta_budget_bytes");
  } catch (...) {
    store->remove(record->store_handle);
    throw;
  }
  return record;
}

SchedulerConfig Resources::scheduler_config() const {
  SchedulerConfig scheduler;
  scheduler.num_blocks = num_blocks;
  scheduler.block_size = config.block_size;
  scheduler.max_batch_tokens = config.max_batch_tokens;
  scheduler.max_batch_sequences = config.max_batch_sequences;
  scheduler.prefill_chunk_tokens = config.prefill_chunk_tokens;
  scheduler.max_batch_logit_rows = max_logit_rows(config);
  scheduler.max_variants_per_batch = config.max_variants_per_batch;
  // Admission is the front desk's: what it let in is never refused here.
  scheduler.max_waiting = std::numeric_limits<std::int32_t>::max();
  scheduler.max_model_len = config.max_model_len;
  scheduler.num_delta_slots = config.num_delta_slots;
  scheduler.delta_budget_bytes = config.delta_budget_bytes;
  scheduler.max_variant_wait_steps = config.max_variant_wait_steps;
  scheduler.prefix_caching = config.prefix_caching;
  return scheduler;
}

}  // namespace deltazip::engine
