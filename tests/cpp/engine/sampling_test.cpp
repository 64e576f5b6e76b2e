#include "engine/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "engine/harness.h"

namespace deltazip::engine {
namespace {

using test::Finish;

TEST(Sampling, EveryNumberIsBounded) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const std::vector<std::pair<std::string, std::function<void(SamplingParams&)>>> cases = {
      {"n must be", [](auto& p) { p.n = 0; }},
      {"n must be", [](auto& p) { p.n = kMaxChoices + 1; }},
      {"temperature must be", [](auto& p) { p.temperature = -0.1F; }},
      {"temperature must be", [](auto& p) { p.temperature = kNan; }},
      {"top_p must be", [](auto& p) { p.top_p = 0.0F; }},
      {"top_p must be", [](auto& p) { p.top_p = 1.1F; }},
      {"min_p must be", [](auto& p) { p.min_p = -1.0F; }},
      {"top_k must be", [](auto& p) { p.top_k = -1; }},
      {"repetition_penalty must be", [](auto& p) { p.repetition_penalty = 0.0F; }},
      {"presence_penalty must be", [](auto& p) { p.presence_penalty = kInf; }},
      {"frequency_penalty must be", [](auto& p) { p.frequency_penalty = -kInf; }},
      {"max_tokens must be", [](auto& p) { p.max_tokens = 0; }},
      {"min_tokens must be", [](auto& p) { p.min_tokens = 17; }},
      {"min_tokens must be", [](auto& p) { p.min_tokens = -1; }},
      {"logprobs must be", [](auto& p) { p.logprobs = kMaxLogprobs + 1; }},
      {"prompt_logprobs must be", [](auto& p) { p.prompt_logprobs = -2; }},
      {"stop_token_ids: token 100", [](auto& p) { p.stop_token_ids = {100}; }},
      {"stop_token_ids: token -1", [](auto& p) { p.stop_token_ids = {-1}; }},
      {"stop_token_ids: at most", [](auto& p) { p.stop_token_ids.assign(2000, 1); }},
      {"logit_bias: token 100", [](auto& p) { p.logit_bias = {{100, 1.0F}}; }},
      {"logit_bias must be", [](auto& p) { p.logit_bias = {{1, kNan}}; }},
  };
  EXPECT_NO_THROW(check_sampling({}, 100));
  for (const auto& [message, change] : cases) {
    SamplingParams params;
    change(params);
    const std::string error =
        test::message_of<InvalidArgument>([&] { check_sampling(params, 100); });
    EXPECT_NE(error.find(message), std::string::npos)
        << "expected " << message << ", got " << error;
  }
}

TEST(Sampling, JudgesStopBeforeLengthAndOnlyAfterMinTokens) {
  SamplingParams params;
  params.max_tokens = 3;
  params.stop_token_ids = {9, 4};
  const auto stops = stop_set(params, std::vector<std::int32_t>{2, 4});
  EXPECT_EQ(stops, (std::vector<std::int32_t>{2, 4, 9}));
  EXPECT_EQ(judge(params, stops, 0, 5).finish, Finish::kNone);
  EXPECT_EQ(judge(params, stops, 2, 5).finish, Finish::kLength);
  EXPECT_TRUE(judge(params, stops, 2, 5).is_output);
  EXPECT_EQ(judge(params, stops, 2, 9).finish, Finish::kStop);
  EXPECT_FALSE(judge(params, stops, 2, 9).is_output);

  params.min_tokens = 2;
  const std::vector<std::int32_t> tokens = {1, 1, 7};
  const SamplingRow early = sampling_row(params, 5, stops, tokens, 2);
  EXPECT_EQ(early.num_banned_tokens, 3);
  EXPECT_EQ(early.num_output_tokens, 1);
  EXPECT_EQ(early.position, 3u);
  EXPECT_EQ(sampling_row(params, 5, stops, tokens, 1).num_banned_tokens, 0);

  params.ignore_eos = true;
  EXPECT_EQ(stop_set(params, std::vector<std::int32_t>{2}), (std::vector<std::int32_t>{4, 9}));
}

}  // namespace
}  // namespace deltazip::engine
