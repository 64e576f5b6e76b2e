#include "engine/batch_builder.h"

#include <gtest/gtest.h>

#include "engine/harness.h"

namespace deltazip::engine {
namespace {

using test::Tokens;

// Two requests in one plan: a chunk in the middle of a prompt, and one decoded token.
class BatchBuilderTest : public testing::Test {
 protected:
  ActiveRequest& add(std::int64_t id, std::size_t prompt_length, std::int32_t prompt_logprobs) {
    Request request = test::make_request(id, "", Tokens(prompt_length, 1), 8);
    request.sampling.prompt_logprobs = prompt_logprobs;
    ActiveRequest& active = requests.add(request, std::make_shared<VariantRecord>(), 0);
    requests.open_sequence({&active, 0});
    return active;
  }
  StepInput build(const Plan& plan) {
    StepInput input;
    builder.build(plan, requests, input);
    return input;
  }

  RequestTable requests;
  std::vector<SlotId> slots_asked;
  BatchBuilder builder{4, [this](SlotId slot) {
                         slots_asked.push_back(slot);
                         return static_cast<const VariantWeights*>(nullptr);
                       }};
};

TEST_F(BatchBuilderTest, LaysOutRowsBySlotWithPositionsAndCacheSlots) {
  ActiveRequest& first = add(1, 9, -1);
  ActiveRequest& second = add(2, 3, -1);
  const Tokens chunk = {11, 12, 13}, decoded = {21};
  const std::vector<BlockId> first_blocks = {5, 2, 9}, second_blocks = {7, 1};
  Plan plan;
  plan.chunks = {{first.choices[0].sequence, 0, kNoSlot, 3, 3, false, chunk, first_blocks},
                 {second.choices[0].sequence, 1, 2, 5, 1, true, decoded, second_blocks}};
  const StepInput input = build(plan);
  const Batch& batch = input.batch;
  EXPECT_EQ(batch.tokens, (Tokens{11, 12, 13, 21}));
  EXPECT_EQ(batch.positions, (Tokens{3, 4, 5, 5}));
  EXPECT_EQ(batch.cache_slots,
            (std::vector<std::int64_t>{5 * 4 + 3, 2 * 4 + 0, 2 * 4 + 1, 1 * 4 + 1}));
  EXPECT_EQ(batch.rope_lengths, (Tokens{9, 9, 9, 6}))
      << "a prompt's whole length; the length so far";
  EXPECT_EQ(slots_asked, (std::vector<SlotId>{kNoSlot, 2}));
  ASSERT_EQ(batch.segments.size(), 2u);
  EXPECT_EQ(batch.segments[1].first_row, 3);
  EXPECT_EQ(batch.segments[0].num_rows, 3);
  ASSERT_EQ(batch.sequences.size(), 2u);
  EXPECT_EQ(batch.sequences[0].context_length, 6);
  EXPECT_EQ(batch.sequences[1].first_row, 3);
  EXPECT_EQ(batch.sequences[1].blocks, second_blocks.data());
  EXPECT_EQ(batch.logit_rows, (Tokens{3}));
  ASSERT_EQ(input.uses.size(), 1u);
  EXPECT_EQ(input.uses[0].choice.request, &second);
  EXPECT_EQ(input.uses[0].scored_prompt, -1);
}

TEST_F(BatchBuilderTest, ScoresEachPromptTokenOnce) {
  ActiveRequest& request = add(1, 4, 0);
  request.prompt_logprobs[1] = TokenLogprobs{};  // known from before a preemption
  const Tokens tokens = {1, 1, 1, 1};
  const std::vector<BlockId> blocks = {0};
  Plan plan;
  plan.chunks = {{request.choices[0].sequence, 0, kNoSlot, 0, 4, true, tokens, blocks}};
  const StepInput input = build(plan);
  EXPECT_EQ(input.batch.logit_rows, (Tokens{1, 2, 3}));
  ASSERT_EQ(input.uses.size(), 3u);
  EXPECT_EQ(input.uses[0].scored_prompt, 2);
  EXPECT_EQ(input.uses[1].scored_prompt, 3);
  EXPECT_EQ(input.uses[2].scored_prompt, -1) << "the last row samples";
}

TEST_F(BatchBuilderTest, APlanThatBreaksItsPromiseIsAnInternalError) {
  ActiveRequest& request = add(1, 4, -1);
  const Tokens tokens = {1, 1};
  const std::vector<BlockId> blocks = {0};
  Plan plan;
  plan.chunks = {{request.choices[0].sequence, 1, 3, 0, 2, false, tokens, blocks},
                 {request.choices[0].sequence, 1, 2, 0, 2, false, tokens, blocks}};
  EXPECT_THROW(build(plan), InternalError) << "not sorted by slot";
  plan.chunks = {{request.choices[0].sequence, 1, 3, 3, 2, false, tokens, blocks}};
  EXPECT_THROW(build(plan), InternalError) << "too few blocks";
  plan.chunks = {{99, 1, 3, 0, 2, false, tokens, blocks}};
  EXPECT_THROW(build(plan), InternalError) << "nobody's sequence";
}

}  // namespace
}  // namespace deltazip::engine
