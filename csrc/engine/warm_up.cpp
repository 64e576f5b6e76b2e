#include "engine/warm_up.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <vector>

namespace deltazip::engine {
namespace {

using Clock = std::chrono::steady_clock;

// What is not recorded until then is recorded when it first comes.
constexpr double kMaxSeconds = 10.0;
// Fewer rows are a decode's. A device's library chooses products by the number of rows: its choices
// are asked for at quarters of an octave, and from kManyRows on at whole ones.
constexpr std::int32_t kLeastPrefillRows = 64, kQuartersFrom = 128, kManyRows = 2048;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::int32_t next_prefill_rows(std::int32_t rows) {
  if (rows < kQuartersFrom || rows >= kManyRows) return 2 * rows;
  return rows + static_cast<std::int32_t>(std::bit_floor(static_cast<std::uint32_t>(rows))) / 4;
}

// All sizes that decode steps are padded to.
std::vector<std::int32_t> decode_sizes(const Resources& resources) {
  const EngineConfig& config = resources.config;
  std::vector<std::int32_t> sizes;
  const std::int32_t most = std::min(config.max_batch_sequences, config.max_batch_tokens);
  for (std::int32_t rows = 1; rows <= most; ++rows) {
    const std::int32_t size = resources.backend->padded_rows(rows);
    if (size > 0 && (sizes.empty() || size > sizes.back())) sizes.push_back(size);
  }
  return sizes;
}

// Sampling is a kernel like others.
void sample(Resources& resources, ConstTensorView logits, Stream& stream) {
  SamplingRow row;
  row.temperature = 0.0F;
  SampledToken token;
  resources.backend->ops().sample({&token, 1}, logits, {&row, 1}, stream,
                                  resources.model->sampled().first(1));
  stream.synchronize();
}

}  // namespace

void warm_up(Resources& resources, const LogSink& log) {
  const EngineConfig& config = resources.config;
  if (!config.warm_up || resources.backend->shares_host_memory()) return;
  const Clock::time_point start = Clock::now();
  const std::unique_ptr<Stream> stream = resources.backend->create_stream();
  Model& model = *resources.model;
  KvCache& kv = *resources.kv;

  for (std::int32_t rows = std::min(kLeastPrefillRows, config.max_batch_tokens);;
       rows = std::min(next_prefill_rows(rows), config.max_batch_tokens)) {
    sample(resources, model.rehearse_prefill(rows, kv, *stream), *stream);
    if (rows == config.max_batch_tokens) break;
  }

  const std::vector<std::int32_t> sizes = decode_sizes(resources);
  const std::int32_t most_variants =
      std::min(config.max_variants_per_batch, config.num_delta_slots);
  std::size_t num_recorded = 0;
  // By room for variants: the base's own steps first, then one variant, two, four.
  for (std::int32_t room = 0;; room = std::max(1, 2 * room)) {
    for (const std::int32_t rows : sizes) {
      if (room / 2 >= rows || seconds_since(start) > kMaxSeconds) continue;
      model.rehearse_decode(rows, room, kv, *stream);
      ++num_recorded;
    }
    if (room >= most_variants) break;
  }
  log(LogLevel::kInfo, detail::concat("warm-up: ", num_recorded, " kinds of decode steps in ",
                                      seconds_since(start), " s"));
}

}  // namespace deltazip::engine
