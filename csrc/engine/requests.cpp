#include "engine/requests.h"

#include <algorithm>
#include <utility>

#include "engine/sampling.h"

namespace deltazip::engine {

ActiveRequest& RequestTable::add(Request request, std::shared_ptr<VariantRecord> variant,
                                 std::uint64_t fallback_seed) {
  auto active = std::make_unique<ActiveRequest>();
  active->seed = request.sampling.seed.value_or(fallback_seed);
  active->stop_tokens = stop_set(request.sampling, variant->eos_token_ids);
  active->choices.resize(static_cast<std::size_t>(request.sampling.n));
  active->num_open = request.sampling.n;
  if (request.sampling.prompt_logprobs >= 0) active->prompt_logprobs.resize(request.prompt.size());
  active->variant = std::move(variant);
  active->request = std::move(request);
  const std::int64_t id = active->request.id;
  const auto [entry, is_new] = requests_.emplace(id, std::move(active));
  DZ_INTERNAL(is_new, "request ", id, " is alive already");
  return *entry->second;
}

void RequestTable::erase(std::int64_t request_id) {
  const ActiveRequest* request = find(request_id);
  DZ_INTERNAL(request != nullptr && request->num_open == 0, "request ", request_id,
              " is unknown or has open choices");
  requests_.erase(request_id);
}

ActiveRequest* RequestTable::find(std::int64_t request_id) {
  const auto found = requests_.find(request_id);
  return found == requests_.end() ? nullptr : found->second.get();
}

SequenceId RequestTable::open_sequence(ChoiceRef choice) {
  choice.choice().sequence = next_sequence_;
  sequences_.emplace(next_sequence_, choice);
  return next_sequence_++;
}

void RequestTable::close_sequence(ChoiceRef choice) {
  sequences_.erase(std::exchange(choice.choice().sequence, kNoSequence));
}

ChoiceRef RequestTable::at(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  DZ_INTERNAL(found != sequences_.end(), "sequence ", sequence, " belongs to no request");
  return found->second;
}

ActiveRequest* RequestTable::owner(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  return found == sequences_.end() ? nullptr : found->second.request;
}

std::vector<ActiveRequest*> RequestTable::all() {
  std::vector<ActiveRequest*> requests;
  requests.reserve(requests_.size());
  for (auto& [id, request] : requests_) requests.push_back(request.get());
  return requests;
}

void RequestTable::check() const {
  std::size_t num_sequences = 0;
  for (const auto& [id, request] : requests_) {
    std::int32_t num_open = 0;
    for (std::size_t i = 0; i < request->choices.size(); ++i) {
      const Choice& choice = request->choices[i];
      num_open += choice.is_done ? 0 : 1;
      if (choice.sequence == kNoSequence) continue;
      ++num_sequences;
      const ChoiceRef ref = at(choice.sequence);
      DZ_INTERNAL(ref.request == request.get() && ref.index == static_cast<std::int32_t>(i),
                  "sequence ", choice.sequence, " points to another choice");
      DZ_INTERNAL(!choice.is_done, "request ", id, ", choice ", i, " is done but has a sequence");
    }
    DZ_INTERNAL(num_open == request->num_open && num_open > 0, "request ", id, " counts ",
                request->num_open, " open choices, has ", num_open);
  }
  DZ_INTERNAL(num_sequences == sequences_.size(), sequences_.size(), " sequences known, ",
              num_sequences, " in use");
}

}  // namespace deltazip::engine
