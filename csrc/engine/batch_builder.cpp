#include "engine/batch_builder.h"

namespace deltazip::engine {

void BatchBuilder::build(const Plan& plan, const RequestTable& requests, StepInput& input) const {
  Batch& batch = input.batch;
  batch.clear();
  input.uses.clear();
  for (std::size_t index = 0; index < plan.chunks.size(); ++index) {
    const ScheduledChunk& chunk = plan.chunks[index];
    const ChoiceRef choice = requests.at(chunk.id);
    const ActiveRequest& request = *choice.request;
    const auto first_row = static_cast<std::int32_t>(batch.tokens.size());

    if (index == 0 || plan.chunks[index - 1].slot != chunk.slot) {
      DZ_INTERNAL(index == 0 || plan.chunks[index - 1].slot < chunk.slot,
                  "a plan's chunks are sorted by slot");
      batch.segments.push_back({weights_of_slot_(chunk.slot), first_row, 0});
    }
    batch.segments.back().num_rows += chunk.num_tokens;
    add_rows(chunk, choice, batch);

    for (std::int32_t i = 0; i < chunk.num_tokens; ++i) {
      // The row at position p scores the prompt token at p + 1, once: a recomputation after a
      // preemption passes here again.
      const std::int32_t next = chunk.start + i + 1;
      if (request.wants_prompt_logprobs() && next < request.prompt_length() &&
          !request.prompt_logprobs[static_cast<std::size_t>(next)]) {
        batch.logit_rows.push_back(first_row + i);
        input.uses.push_back({choice, index, next});
      }
    }
    if (chunk.samples) {
      batch.logit_rows.push_back(first_row + chunk.num_tokens - 1);
      input.uses.push_back({choice, index, -1});
    }
  }
}

void BatchBuilder::add_rows(const ScheduledChunk& chunk, ChoiceRef choice, Batch& batch) const {
  const std::int32_t prompt_length = choice.request->prompt_length();
  const std::int32_t end = chunk.start + chunk.num_tokens;
  DZ_INTERNAL(
      chunk.num_tokens > 0 && chunk.tokens.size() == static_cast<std::size_t>(chunk.num_tokens),
      "a chunk of ", chunk.num_tokens, " tokens brings ", chunk.tokens.size());
  DZ_INTERNAL(static_cast<std::int64_t>(chunk.blocks.size()) * block_size_ >= end,
              chunk.blocks.size(), " blocks hold no ", end, " positions");
  batch.sequences.push_back(
      {static_cast<std::int32_t>(batch.tokens.size()), chunk.num_tokens, end, chunk.blocks.data()});
  for (std::int32_t position = chunk.start; position < end; ++position) {
    const std::int64_t block = chunk.blocks[static_cast<std::size_t>(position / block_size_)];
    const std::int32_t token = chunk.tokens[static_cast<std::size_t>(position - chunk.start)];
    // Still being sampled: the device knows it by its row of the step before.
    batch.tokens.push_back(token == kUnknownToken ? ~choice.choice().sampled_row : token);
    batch.positions.push_back(position);
    batch.cache_slots.push_back(block * block_size_ + position % block_size_);
    // Dynamic RoPE scales a prompt by its whole length, an output token by the length so far.
    batch.rope_lengths.push_back(position < prompt_length ? prompt_length : position + 1);
  }
}

}  // namespace deltazip::engine
