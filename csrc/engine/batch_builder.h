#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "deltazip/model/model.h"
#include "engine/requests.h"

namespace deltazip::engine {

// What one wanted logit row is for: a token to sample, or a prompt token to score.
struct LogitUse {
  ChoiceRef choice;
  std::size_t chunk = 0;            // of the plan
  std::int32_t scored_prompt = -1;  // >= 0: place in the prompt of the token scored by this row
};

struct StepInput {
  Batch batch;                 // points into the plan it was built from
  std::vector<LogitUse> uses;  // one for each of batch.logit_rows
};

// Turns a plan into the rows that Model::forward takes.
class BatchBuilder {
 public:
  using WeightsOfSlot = std::function<const VariantWeights*(SlotId slot)>;  // kNoSlot: the base

  BatchBuilder(std::int32_t block_size, WeightsOfSlot weights_of_slot)
      : block_size_(block_size), weights_of_slot_(std::move(weights_of_slot)) {}

  // Into `input`, whose memory is kept from step to step.
  void build(const Plan& plan, const RequestTable& requests, StepInput& input) const;

 private:
  void add_rows(const ScheduledChunk& chunk, ChoiceRef choice, Batch& batch) const;

  std::int32_t block_size_;
  WeightsOfSlot weights_of_slot_;
};

}  // namespace deltazip::engine
