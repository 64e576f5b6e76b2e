// One request at a time: what comes out is what the model and the parameters say.

#include "deltazip/engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "engine/harness.h"

namespace deltazip {
namespace {

using test::Answer;
using test::Answers;
using test::ask;
using test::ask_one;
using test::Finish;
using test::make_request;
using test::TinyHouse;
using test::Tokens;

class EngineTest : public testing::Test {
 protected:
  // Log-softmax of the reference's last row.
  std::vector<double> reference_logprobs(const Tokens& tokens) const {
    const std::vector<double> all = test::reference_logits(house.model, tokens);
    const auto vocab = static_cast<std::ptrdiff_t>(house.model.config.vocab_size);
    std::vector<double> row(all.end() - vocab, all.end());
    double total = 0.0;
    for (const double value : row) total += std::exp(value);
    for (double& value : row) value -= std::log(total);
    return row;
  }

  TinyHouse house;
  Engine engine{house.config(), test::silent};
  const Tokens prompt = test::random_tokens(11, 5);
};

TEST_F(EngineTest, GreedyFollowsTheReference) {
  const Answer answer = ask_one(engine, make_request(1, "", prompt, 20));
  ASSERT_EQ(answer.tokens.size(), 20u);
  EXPECT_EQ(answer.finish, Finish::kLength);
  Tokens tokens = prompt;
  for (const std::int32_t token : answer.tokens) {
    const std::vector<double> expected = reference_logprobs(tokens);
    const double best = *std::ranges::max_element(expected);
    EXPECT_GT(expected[static_cast<std::size_t>(token)], best - 1e-4);
    tokens.push_back(token);
  }
}

TEST_F(EngineTest, LogprobsAreTheReferences) {
  Request request = make_request(1, "", prompt, 6);
  request.sampling.logprobs = 5;
  request.sampling.prompt_logprobs = 2;
  const Answer answer = ask_one(engine, std::move(request));
  ASSERT_EQ(answer.logprobs.size(), 6u);
  ASSERT_EQ(answer.prompt_logprobs.size(), prompt.size());
  EXPECT_FALSE(answer.prompt_logprobs[0].has_value()) << "nothing comes before the first token";

  const auto check = [&](const TokenLogprobs& got, const Tokens& before, std::size_t num_top) {
    std::vector<double> expected = reference_logprobs(before);
    const double own = expected[static_cast<std::size_t>(got.token)];
    EXPECT_NEAR(got.logprob, own, 1e-3);
    const auto rank = 1 + std::ranges::count_if(expected, [&](double v) { return v > own + 1e-4; });
    EXPECT_NEAR(got.rank, static_cast<double>(rank), 1);
    ASSERT_EQ(got.top.size(), num_top);
    for (const auto& [token, logprob] : got.top) {
      EXPECT_NEAR(logprob, expected[static_cast<std::size_t>(token)], 1e-3);
    }
    std::ranges::sort(expected, std::greater());
    for (std::size_t i = 0; i < num_top; ++i) EXPECT_NEAR(got.top[i].second, expected[i], 1e-3);
  };
  Tokens before = {prompt[0]};
  for (std::size_t i = 1; i < prompt.size(); ++i) {
    ASSERT_TRUE(answer.prompt_logprobs[i].has_value());
    EXPECT_EQ(answer.prompt_logprobs[i]->token, prompt[i]);
    check(*answer.prompt_logprobs[i], before, 2);
    before.push_back(prompt[i]);
  }
  for (std::size_t i = 0; i < answer.tokens.size(); ++i) {
    EXPECT_EQ(answer.logprobs[i].token, answer.tokens[i]);
    check(answer.logprobs[i], before, 5);
    before.push_back(answer.tokens[i]);
  }
}

TEST_F(EngineTest, SampledFrequenciesFollowTheProbabilities) {
  constexpr int kDraws = 400;
  std::vector<Request> requests;
  for (int i = 0; i < kDraws; ++i) {
    Request request = make_request(i, "", prompt, 1);
    request.sampling.temperature = 1.0F;
    request.sampling.seed = static_cast<std::uint64_t>(i);
    requests.push_back(std::move(request));
  }
  std::vector<double> counts(static_cast<std::size_t>(house.model.config.vocab_size), 0.0);
  for (const auto& [key, answer] : ask(engine, std::move(requests))) {
    counts[static_cast<std::size_t>(answer.tokens.at(0))] += 1.0 / kDraws;
  }
  const std::vector<double> expected = reference_logprobs(prompt);
  double distance = 0.0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    distance += std::abs(counts[i] - std::exp(expected[i])) / 2.0;
  }
  EXPECT_LT(distance, 0.15) << "total variation; 61 outcomes of 400 draws";
}

TEST_F(EngineTest, AStopTokenEndsTheOutputAndIsNotPartOfIt) {
  const Answer whole = ask_one(engine, make_request(1, "", prompt, 16));
  const std::int32_t stop = whole.tokens[4];
  const auto first = std::ranges::find(whole.tokens, stop) - whole.tokens.begin();
  Request request = make_request(2, "", prompt, 16);
  request.sampling.stop_token_ids = {stop};
  const Answer stopped = ask_one(engine, request);
  EXPECT_EQ(stopped.finish, Finish::kStop);
  EXPECT_EQ(stopped.stop_token, stop);
  EXPECT_EQ(stopped.tokens, Tokens(whole.tokens.begin(), whole.tokens.begin() + first));

  request.id = 3;
  request.sampling.min_tokens = 16;
  const Answer banned = ask_one(engine, request);
  EXPECT_EQ(banned.finish, Finish::kLength);
  EXPECT_EQ(banned.tokens.size(), 16u);
  EXPECT_EQ(std::ranges::count(banned.tokens, stop), 0) << "banned until min_tokens are out";
}

TEST_F(EngineTest, TheModelsEndTokenStopsUnlessIgnored) {
  Request request = make_request(1, "", prompt, 16);
  request.sampling.ignore_eos = false;
  request.sampling.logit_bias = {{house.model.config.eos_token_ids.at(0), 1000.0F}};
  const Answer stopped = ask_one(engine, request);
  EXPECT_EQ(stopped.finish, Finish::kStop);
  EXPECT_EQ(stopped.stop_token, 2);
  EXPECT_TRUE(stopped.tokens.empty());
  request.id = 2;
  request.sampling.ignore_eos = true;
  EXPECT_EQ(ask_one(engine, request).tokens, Tokens(16, 2));
}

TEST_F(EngineTest, GenerationConfigNamesTheEndTokens) {
  test::write_file(house.base() / "generation_config.json", R"({"eos_token_id": [7, 8]})");
  const auto folder = house.write_variant("own-end", 3);
  test::write_file(folder / "generation_config.json", R"({"eos_token_id": 9})");
  Engine other(house.config(), test::silent);
  other.add_variant("own-end", folder.string());
  std::int64_t id = 0;
  for (const auto& [variant, token] :
       std::vector<std::pair<std::string, std::int32_t>>{{"", 8}, {"own-end", 9}}) {
    Request request = make_request(++id, variant, prompt, 4);
    request.sampling.ignore_eos = false;
    request.sampling.logit_bias = {{token, 1000.0F}};
    EXPECT_EQ(ask_one(other, request).stop_token, token);
  }
}

TEST_F(EngineTest, ChoicesDrawFromSeedPlusTheirNumber) {
  for (const std::int32_t max_tokens : {1, 9}) {
    Request many = make_request(100, "", prompt, max_tokens);
    many.sampling.temperature = 1.5F;
    many.sampling.seed = 40;
    many.sampling.n = 5;
    const Answers together = ask(engine, {many});
    ASSERT_EQ(together.size(), 5u);
    for (std::int32_t i = 0; i < 5; ++i) {
      Request one = many;
      one.sampling.n = 1;
      one.sampling.seed = 40 + static_cast<std::uint64_t>(i);
      EXPECT_EQ(together.at({100, i}).tokens, ask_one(engine, one).tokens) << "choice " << i;
      EXPECT_EQ(together.at({100, i}).finish, Finish::kLength);
    }
  }
  engine.check();
}

TEST_F(EngineTest, AChoiceMayStopAtItsFirstTokenAndTheOthersGoOn) {
  Request many = make_request(1, "", prompt, 6);
  many.sampling.temperature = 2.0F;
  many.sampling.seed = 1;
  many.sampling.n = 6;
  const std::int32_t first_of_parent = ask(engine, {many}).at({1, 0}).tokens.at(0);
  many.id = 2;
  many.sampling.stop_token_ids = {first_of_parent};
  const Answers answers = ask(engine, {many});
  EXPECT_TRUE(answers.at({2, 0}).tokens.empty());
  EXPECT_EQ(answers.at({2, 0}).finish, Finish::kStop);
  std::size_t num_tokens = 0;
  for (const auto& [key, answer] : answers) num_tokens += answer.tokens.size();
  EXPECT_GT(num_tokens, 6u);
  engine.check();
  EXPECT_EQ(engine.stats().scheduler.num_free_blocks, engine.stats().scheduler.num_blocks);
}

TEST(EngineChoices, OneIsCancelledAndItsSiblingsGoOn) {
  TinyHouse house(R"({"max_position_embeddings": 1024})");
  Engine engine(house.config(), test::silent);
  Request many = make_request(1, "", test::random_tokens(11, 5), 800);
  many.sampling.temperature = 1.5F;
  many.sampling.seed = 3;
  many.sampling.n = 3;
  const Answers whole = ask(engine, {many});
  for (const std::int32_t unwanted : {0, 2}) {
    many.id += 1;
    engine.submit(many);
    Answers answers;
    while (answers[{many.id, unwanted}].tokens.empty()) {
      for (OutputEvent& event : engine.poll(1, 1000)) test::add_event(answers, std::move(event));
    }
    engine.cancel(many.id, unwanted);
    test::collect(engine, 3, answers);
    for (std::int32_t i = 0; i < 3; ++i) {
      const Answer& answer = answers.at({many.id, i});
      EXPECT_EQ(answer.num_finishes, 1);
      EXPECT_EQ(answer.finish, i == unwanted ? Finish::kCancelled : Finish::kLength);
      const Tokens& tokens = whole.at({1, i}).tokens;
      EXPECT_EQ(answer.tokens, i == unwanted
                                   ? Tokens(tokens.begin(), tokens.begin() + answer.tokens.size())
                                   : tokens);
    }
    EXPECT_LT(answers.at({many.id, unwanted}).tokens.size(), 800u);
  }
  EXPECT_EQ(engine.stats().num_finished, 3);
  EXPECT_EQ(engine.stats().num_cancelled, 0) << "counts requests";
  EXPECT_EQ(engine.stats().scheduler.num_free_blocks, engine.stats().scheduler.num_blocks);
  engine.check();
}

TEST(EngineChoices, OneCancelledBeforeItsFirstTokenGivesNone) {
  TinyHouse house;
  EngineConfig config = house.config();
  config.max_batch_sequences = 3;
  Engine engine(config, test::silent);
  const Tokens prompt = test::random_tokens(11, 5);
  for (const bool cancels_all : {false, true}) {
    for (std::int64_t id = 10; id < 22; ++id) engine.submit(make_request(id, "", prompt, 100));
    Request many = make_request(cancels_all ? 2 : 1, "", prompt, 8);  // waits behind them
    many.sampling.n = 3;
    engine.submit(many);
    engine.cancel(many.id, 0);  // the one that the others are forked from
    engine.cancel(many.id, 0);
    engine.cancel(many.id, 1);
    if (cancels_all) engine.cancel(many.id, 2);
    Answers answers;
    test::collect(engine, 12 + 3, answers);
    for (std::int32_t i = 0; i < 3; ++i) {
      const bool is_cancelled = cancels_all || i != 2;
      EXPECT_EQ(answers.at({many.id, i}).finish,
                is_cancelled ? Finish::kCancelled : Finish::kLength);
      EXPECT_EQ(answers.at({many.id, i}).tokens.size(), is_cancelled ? 0u : 8u);
    }
  }
  EXPECT_EQ(engine.stats().num_finished, 2 * 12 + 1);
  EXPECT_EQ(engine.stats().num_cancelled, 1);
  engine.check();
}

TEST_F(EngineTest, CancelRefusesAChoiceThatIsNotThere) {
  engine.submit(make_request(1, "", prompt, 100));
  EXPECT_THROW(engine.cancel(1, 1), InvalidArgument);
  EXPECT_THROW(engine.cancel(1, -1), InvalidArgument);
  engine.cancel(7, 3);  // unknown ids are ignored
  engine.cancel(1, 0);
  Answers answers;
  test::collect(engine, 1, answers);
  EXPECT_EQ(test::only(answers).finish, Finish::kCancelled);
}

TEST_F(EngineTest, AFreshSeedEachTimeUnlessOneIsGiven) {
  Request request = make_request(1, "", prompt, 12);
  request.sampling.temperature = 5.0F;
  const Tokens first = ask_one(engine, request).tokens;
  request.id = 2;
  EXPECT_NE(ask_one(engine, request).tokens, first);
}

TEST_F(EngineTest, CountsWhatItDid) {
  ask(engine, {make_request(1, "", prompt, 5), make_request(2, "", prompt, 7)});
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.num_requests, 2);
  EXPECT_EQ(stats.num_finished, 2);
  EXPECT_EQ(stats.num_cancelled + stats.num_errors, 0);
  EXPECT_EQ(stats.num_prompt_tokens, 22);
  EXPECT_EQ(stats.num_output_tokens, 12);
  EXPECT_EQ(stats.scheduler.num_running + stats.scheduler.num_waiting, 0);
  EXPECT_EQ(stats.seconds_since_progress, 0.0);
  const VariantInfo base = engine.variants().at(0);
  EXPECT_EQ(base.name, "base");
  EXPECT_EQ(base.content_digest, engine.base_digest());
  EXPECT_EQ(base.num_requests, 2);
  EXPECT_EQ(base.num_output_tokens, 12);
  EXPECT_EQ(base.num_running + base.num_waiting, 0);
}

TEST_F(EngineTest, AnIdMayBeUsedAgainOnceItsLastEventIsOut) {
  for (int i = 0; i < 200; ++i) ask_one(engine, make_request(1, "", prompt, 2));
}

TEST(EngineRope, LongPromptsUnderDynamicRopeShareOnlyWithTheirLength) {
  TinyHouse house(R"({"max_position_embeddings": 16,
                      "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}})");
  Engine engine(house.config(), test::silent);
  EXPECT_EQ(engine.config().max_model_len, 64);
  const Tokens tokens = test::random_tokens(40, 9);
  std::int64_t id = 0;
  // Each alone in a fresh engine, then all after one another in one: caching must change nothing.
  for (const std::size_t length : {40u, 36u, 24u, 16u, 12u, 40u}) {
    const Tokens prompt(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(length));
    Engine fresh(house.config(), test::silent);
    EXPECT_EQ(ask_one(engine, make_request(++id, "", prompt, 12)).tokens,
              ask_one(fresh, make_request(1, "", prompt, 12)).tokens)
        << length;
  }
}

}  // namespace
}  // namespace deltazip
