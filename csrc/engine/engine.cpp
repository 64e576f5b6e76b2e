#include "deltazip/engine/engine.h"

#include <atomic>
#include <mutex>
#include <string>
#include <utility>

#include "engine/front_desk.h"
#include "engine/loop.h"
#include "engine/outbox.h"
#include "engine/resources.h"
#include "engine/sampling.h"

namespace deltazip {

using engine::FrontDesk;
using engine::kAllChoices;
using engine::Loop;
using engine::Outbox;
using engine::Resources;
using engine::VariantRecord;

struct Engine::Impl {
  Impl(const EngineConfig& config, const LogSink& log, std::unique_ptr<Backend> backend)
      : resources(config, log, std::move(backend)),
        desk(resources.base_record(), resources.config.max_waiting),
        loop(resources, desk, outbox, log) {}

  void check_request(const Request& request) const;

  Resources resources;
  FrontDesk desk;
  Outbox outbox;
  std::atomic<VariantId> next_variant{kBaseVariant + 1};
  std::mutex lifecycle;  // of the loop's thread
  Loop loop;
};

void Engine::Impl::check_request(const Request& request) const {
  const auto vocab_size = static_cast<std::int32_t>(resources.model_config.vocab_size);
  const EngineConfig& config = resources.config;
  DZ_CHECK(!request.prompt.empty(), "the prompt is empty");
  for (const std::int32_t token : request.prompt) {
    DZ_CHECK(token >= 0 && token < vocab_size, "the prompt's token ", token,
             " is not in the vocabulary of ", vocab_size);
  }
  engine::check_sampling(request.sampling, vocab_size);
  const auto length = static_cast<std::int64_t>(request.prompt.size());
  DZ_CHECK(length + request.sampling.max_tokens <= config.max_model_len, "the prompt has ", length,
           " tokens and max_tokens is ", request.sampling.max_tokens, ", together ",
           length + request.sampling.max_tokens, ", but max_model_len is ", config.max_model_len);
  DZ_CHECK(request.sampling.n <= config.max_batch_sequences, "n is ", request.sampling.n,
           ", but max_batch_sequences is ", config.max_batch_sequences);
}

Engine::Engine(const EngineConfig& config, const LogSink& log) : Engine(config, log, nullptr) {}

Engine::Engine(const EngineConfig& config, const LogSink& log, std::unique_ptr<Backend> backend)
    : impl_(std::make_unique<Impl>(config, log, std::move(backend))) {}

Engine::~Engine() { shutdown(); }

VariantInfo Engine::add_variant(const std::string& name, const std::string& path) {
  impl_->desk.reserve(name);
  std::shared_ptr<VariantRecord> record;
  try {
    record = impl_->resources.open_variant(name, path);
    record->id = impl_->next_variant++;
    impl_->desk.advertise(record);
  } catch (...) {
    if (record) impl_->resources.store->remove(record->store_handle);
    impl_->desk.release(name);
    throw;
  }
  return record->info();
}

void Engine::remove_variant(const std::string& name) { impl_->desk.retire(name); }
bool Engine::is_draining(const std::string& name) const { return impl_->desk.is_draining(name); }
std::vector<VariantInfo> Engine::variants() const { return impl_->desk.variants(); }

void Engine::submit(Request request) {
  (void)impl_->desk.find(request.variant);  // an unknown name is said before a bad number
  impl_->check_request(request);
  impl_->desk.submit(std::move(request));
}

void Engine::cancel(std::int64_t request_id) { impl_->desk.cancel(request_id, kAllChoices); }

void Engine::cancel(std::int64_t request_id, std::int32_t choice) {
  DZ_CHECK(choice >= 0, "choice must not be negative, got ", choice);
  impl_->desk.cancel(request_id, choice);
}

std::vector<OutputEvent> Engine::poll(std::int32_t max_events, std::int32_t timeout_ms) {
  DZ_CHECK(max_events > 0, "max_events must be at least 1, got ", max_events);
  DZ_CHECK(timeout_ms >= 0, "timeout_ms must not be negative, got ", timeout_ms);
  return impl_->outbox.poll(max_events, timeout_ms);
}

EngineStats Engine::stats() const { return impl_->desk.stats(); }
std::vector<CapacityRow> Engine::capacity() const { return impl_->resources.capacity; }
const EngineConfig& Engine::config() const { return impl_->resources.config; }
std::string Engine::base_digest() const { return impl_->resources.base_digest.hex(); }
std::string Engine::model_config_json() const { return impl_->resources.config_json; }
std::int32_t Engine::vocab_size() const {
  return static_cast<std::int32_t>(impl_->resources.model_config.vocab_size);
}
std::string Engine::device_description() const { return impl_->resources.backend->description(); }

void Engine::set_prefill_chunk_tokens(std::int32_t num_tokens) {
  engine::check_prefill_chunk_tokens(num_tokens);
  const bool has_run =
      impl_->desk.call([this, num_tokens] { impl_->loop.set_prefill_chunk_tokens(num_tokens); });
  DZ_INTERNAL(has_run, "the engine has stopped");
}

void Engine::check() const {
  if (impl_->desk.call([this] { impl_->loop.check(); })) return;
  const std::string failure = impl_->desk.stats().failure;
  DZ_INTERNAL(failure.empty(), "the engine has failed: ", failure);
  const std::lock_guard lock(impl_->lifecycle);
  impl_->loop.join();
  impl_->loop.check();
}

void Engine::shutdown() {
  impl_->desk.stop();
  const std::lock_guard lock(impl_->lifecycle);
  impl_->loop.join();
}

}  // namespace deltazip
