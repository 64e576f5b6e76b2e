// What comes in: commands, finished loads, variants that have drained.

#include <span>
#include <string>
#include <utility>
#include <variant>

#include "deltazip/schedule/block_allocator.h"
#include "engine/loop.h"
#include "engine/sampling.h"

namespace deltazip::engine {
namespace {

// Positions of a long prompt under dynamic RoPE depend on the prompt's length, so its blocks may
// be shared with prompts of that length only.
Digest root_for_length(const Digest& root, std::int64_t prompt_length) {
  return Sha256()
      .update("dynamic rope")
      .update(std::as_bytes(std::span(root.bytes)))
      .update(std::to_string(prompt_length))
      .finish();
}

}  // namespace

void Loop::accept() {
  for (Command& command : desk_.take()) {
    std::visit([this](auto& each) { handle(each); }, command);
  }
  finish_loads();
  forget_drained();
  bury();
}

void Loop::handle(Submit& command) {
  ++stats_.num_requests;
  ++command.variant->num_requests;
  ActiveRequest& active =
      requests_.add(std::move(command.request), std::move(command.variant), seeds_());
  try {
    const Request& request = active.request;
    const RopeConfig& rope = resources_.model_config.rope;
    const bool is_long = rope.scaling == RopeScaling::kDynamic &&
                         active.prompt_length() > resources_.model_config.max_positions;
    SequenceSpec spec;
    spec.variant = active.variant->id;
    spec.prompt = request.prompt;
    spec.max_new_tokens = request.sampling.max_tokens;
    spec.priority = request.priority;
    spec.prefix_root =
        prefix_root(active.variant->content_digest, std::as_bytes(std::span(request.cache_salt)));
    if (is_long) spec.prefix_root = root_for_length(spec.prefix_root, active.prompt_length());
    spec.use_prefix_cache = !active.wants_prompt_logprobs() && !is_long;
    spec.scores_prompt = active.wants_prompt_logprobs();
    spec.id = requests_.open_sequence({&active, 0});
    ++active.variant->num_waiting;
    scheduler_.add(std::move(spec));
  } catch (const InternalError&) {
    throw;  // ours, and no longer about this request alone
  } catch (const std::exception& error) {
    end_request(active, Finish::kError, error.what());
  }
}

void Loop::handle(Cancel& command) {
  ActiveRequest* request = requests_.find(command.request_id);
  if (request == nullptr) return;
  if (command.choice == kAllChoices) {
    end_request(*request, Finish::kCancelled, "");
  } else {
    cancel_choice({request, command.choice});
  }
}

void Loop::handle(AddVariant& command) {
  scheduler_.add_variant(command.variant->id, command.variant->device_bytes);
  variants_.emplace(command.variant->id, command.variant);
}

void Loop::handle(RemoveVariant& command) { draining_.push_back(std::move(command.variant)); }

void Loop::handle(Call& command) {
  bury();
  try {
    command.function();
    command.done->set_value();
  } catch (...) {
    command.done->set_exception(std::current_exception());
  }
}

void Loop::finish_loads() {
  for (const VariantSlots::Finished& load : slots_.poll()) {
    desk_.progress();
    if (load.error.empty()) {
      scheduler_.delta_loaded(load.slot);
      continue;
    }
    log_(LogLevel::kWarning, load.error);
    for (const SequenceId sequence : scheduler_.delta_load_failed(load.slot)) {
      ActiveRequest* request = requests_.owner(sequence);
      if (request != nullptr) end_request(*request, Finish::kError, load.error);
    }
  }
}

void Loop::forget_drained() {
  std::erase_if(draining_, [this](const std::shared_ptr<VariantRecord>& variant) {
    if (slots_.is_loading(variant->id)) return false;
    if (!scheduler_.try_remove_variant(variant->id)) return false;
    slots_.drop(variant->id);
    variants_.erase(variant->id);
    resources_.store->remove(variant->store_handle);
    desk_.erase(*variant);
    return true;
  });
}

void Loop::start_loads(const Plan& plan) {
  for (const DeltaLoad& load : plan.loads) {
    const auto variant = variants_.find(load.variant);
    DZ_INTERNAL(variant != variants_.end(), "a load of unknown variant ", load.variant);
    slots_.begin(load, variant->second);
  }
}

}  // namespace deltazip::engine
