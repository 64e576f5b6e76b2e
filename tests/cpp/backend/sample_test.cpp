#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

class SampleTest : public BackendTest {
 protected:
  SampledToken sample_one(const Matrix& logits, const SamplingRow& row) {
    SampledToken out;
    ops().sample(std::span(&out, 1), logits.view(), std::span(&row, 1), stream());
    return out;
  }
  // How often each token of one row of logits is drawn over `count` positions.
  std::map<std::int32_t, int> histogram(const Matrix& logits, SamplingRow row, int count) {
    constexpr int kAtOnce = 500;
    std::map<std::int32_t, int> seen;
    for (int start = 0; start < count; start += kAtOnce) {
      const int num_rows = std::min(kAtOnce, count - start);
      Matrix repeated(num_rows, logits.columns());
      std::vector<SamplingRow> rows;
      for (int i = 0; i < num_rows; ++i) {
        std::copy_n(logits.data(), logits.columns(), repeated.row(i));
        row.position = static_cast<std::uint64_t>(start + i);
        rows.push_back(row);
      }
      std::vector<SampledToken> out(rows.size());
      ops().sample(out, repeated.view(), rows, stream());
      for (const SampledToken& each : out) ++seen[each.token];
    }
    return seen;
  }
  void expect_raw_logprobs(std::int32_t size);
};
DZ_ON_EVERY_BACKEND(SampleTest);

Matrix row_of(std::initializer_list<float> values) {
  Matrix logits(1, static_cast<std::int64_t>(values.size()));
  std::copy(values.begin(), values.end(), logits.data());
  return logits;
}

constexpr SamplingRow kGreedy{.temperature = 0.0F};

TEST_P(SampleTest, GreedyTakesTheLargestAndTheLowestOfEquals) {
  for (const std::int64_t size : {1, 15, 16, 17, 1000, 32000, 49152, 128256}) {
    Matrix logits = Matrix::random(1, size, rng_);
    const auto best = static_cast<std::int32_t>(
        std::max_element(logits.data(), logits.data() + size) - logits.data());
    EXPECT_EQ(sample_one(logits, kGreedy).token, best);
    const auto last = static_cast<std::int32_t>(size - 1);
    logits.data()[last] = logits.data()[last / 2] = 100.0F;
    EXPECT_EQ(sample_one(logits, kGreedy).token, last / 2);
  }
}

void SampleTest::expect_raw_logprobs(std::int32_t size) {
  const Matrix logits = Matrix::random(1, size, rng_, 3.0F);
  double top = -1e30, total = 0.0;
  for (int i = 0; i < size; ++i) top = std::max(top, static_cast<double>(logits.data()[i]));
  for (int i = 0; i < size; ++i) total += std::exp(static_cast<double>(logits.data()[i]) - top);
  const double log_total = top + std::log(total);
  std::vector<std::int32_t> order(static_cast<std::size_t>(size));
  for (int i = 0; i < size; ++i) order[static_cast<std::size_t>(i)] = i;
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return logits.data()[a] > logits.data()[b]; });

  SamplingRow row = kGreedy;
  row.num_logprobs = 7;
  row.forced_token = order[123];
  const TokenBias bias{order[123], 50.0F};
  row.biases = &bias;
  row.num_biases = 1;
  const SampledToken out = sample_one(logits, row);
  EXPECT_EQ(out.token, order[123]);
  EXPECT_EQ(out.rank, 124);
  EXPECT_NEAR(out.logprob, static_cast<double>(logits.data()[order[123]]) - log_total, 1e-5);
  ASSERT_EQ(out.num_top, 7);
  for (std::size_t i = 0; i < 7; ++i) {
    EXPECT_EQ(out.top_tokens[i], order[i]);
    EXPECT_NEAR(out.top_logprobs[i], static_cast<double>(logits.data()[order[i]]) - log_total,
                1e-5);
  }
  row.num_logprobs = 0;
  EXPECT_EQ(sample_one(logits, row).num_top, 0);
}

TEST_P(SampleTest, LogprobsAreOfTheRawLogits) {
  for (const std::int32_t size : {5000, 32000, 49152, 128256}) expect_raw_logprobs(size);
}

TEST_P(SampleTest, TopAlternativesReachTheWholeVocabulary) {
  SamplingRow row = kGreedy;
  row.num_logprobs = 20;
  const SampledToken out = sample_one(row_of({0.0F, -1e9F, 5.0F, -300.0F}), row);
  ASSERT_EQ(out.num_top, 4);
  EXPECT_EQ(out.top_tokens[0], 2);
  EXPECT_EQ(out.top_tokens[3], 1);
}

TEST_P(SampleTest, DrawsFollowTheDistribution) {
  const Matrix logits = row_of({0.0F, 1.0F, 2.0F, -1.0F, 0.5F});
  const float temperature = 0.7F;
  constexpr int kDraws = 20000;
  for (const bool filtered : {false, true}) {
    SamplingRow row{.temperature = temperature, .seed = 42};
    if (filtered) row.min_p = 1e-6F;  // keeps all, by the other path
    const auto seen = histogram(logits, row, kDraws);
    double total = 0.0;
    for (int i = 0; i < 5; ++i) total += std::exp(logits.data()[i] / temperature);
    for (int i = 0; i < 5; ++i) {
      const double p = std::exp(logits.data()[i] / temperature) / total;
      const double deviation = std::sqrt(kDraws * p * (1 - p));
      EXPECT_NEAR(seen.contains(i) ? seen.at(i) : 0, kDraws * p, 5 * deviation) << i;
    }
  }
}

TEST_P(SampleTest, FiltersKeepExactlyTheirTokens) {
  // Probabilities about 0.4, 0.3, 0.2, 0.1, shuffled.
  const Matrix logits =
      row_of({std::log(0.2F), std::log(0.4F), std::log(0.1F), std::log(0.3F), -1000.0F});
  const auto kept = [&](SamplingRow row) {
    row.seed = 7;
    std::set<std::int32_t> tokens;
    for (const auto& [token, count] : histogram(logits, row, 400)) tokens.insert(token);
    return tokens;
  };
  EXPECT_EQ(kept({}), (std::set<std::int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(kept({.top_k = 2}), (std::set<std::int32_t>{1, 3}));
  EXPECT_EQ(kept({.top_k = 1}), (std::set<std::int32_t>{1}));
  EXPECT_EQ(kept({.top_k = 100}), (std::set<std::int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(kept({.top_p = 0.69F}), (std::set<std::int32_t>{1, 3}));
  EXPECT_EQ(kept({.top_p = 0.71F}), (std::set<std::int32_t>{0, 1, 3}));
  EXPECT_EQ(kept({.top_p = 1e-6F}), (std::set<std::int32_t>{1}));
  EXPECT_EQ(kept({.min_p = 0.6F}), (std::set<std::int32_t>{1, 3}));
  EXPECT_EQ(kept({.min_p = 1.0F}), (std::set<std::int32_t>{1}));
  // Top-p over what top-k left: 0.4, 0.3, 0.2 renormalised are 0.44, 0.33, 0.22.
  EXPECT_EQ(kept({.top_k = 3, .top_p = 0.76F}), (std::set<std::int32_t>{1, 3}));
  EXPECT_EQ(kept({.top_k = 3, .top_p = 0.79F}), (std::set<std::int32_t>{0, 1, 3}));
}

TEST_P(SampleTest, FiltersAgreeWithASortOnRandomRows) {
  for (int round = 0; round < 42; ++round) {
    constexpr std::int64_t kRealSizes[] = {32000, 128256};
    const std::int64_t size =
        round < 40 ? 50 + static_cast<std::int64_t>(rng_() % 3000) : kRealSizes[round - 40];
    const Matrix logits = Matrix::random(1, size, rng_, round % 2 == 0 ? 6.0F : 0.5F);
    SamplingRow row{.seed = rng_()};
    if (round % 3 != 0) row.top_k = 1 + static_cast<std::int32_t>(rng_() % 80);
    if (round % 3 != 1) row.top_p = 0.3F + 0.69F * static_cast<float>(round) / 42.0F;
    std::vector<std::pair<double, std::int32_t>> order;
    const double top = *std::max_element(logits.data(), logits.data() + size);
    for (std::int32_t i = 0; i < size; ++i) {
      order.emplace_back(-std::exp(static_cast<double>(logits.data()[i]) - top), i);
    }
    std::sort(order.begin(), order.end());
    if (row.top_k > 0) order.resize(std::min(order.size(), static_cast<std::size_t>(row.top_k)));
    double total = 0.0, mass = 0.0;
    for (const auto& [p, token] : order) total -= p;
    std::set<std::int32_t> allowed;
    for (const auto& [p, token] : order) {
      if (!allowed.empty() && mass >= (static_cast<double>(row.top_p) + 1e-6) * total) break;
      allowed.insert(token);
      mass -= p;
    }
    for (const auto& [token, count] : histogram(logits, row, 50)) {
      EXPECT_TRUE(allowed.contains(token)) << "round " << round << " token " << token;
    }
  }
}

TEST_P(SampleTest, PenaltiesBiasesAndBans) {
  const Matrix logits = row_of({2.0F, 1.9F, -1.0F, 1.0F});
  const std::int32_t prompt[] = {0, 0}, output[] = {1, 1, 0};
  SamplingRow row = kGreedy;
  row.prompt_tokens = prompt;
  row.num_prompt_tokens = 2;
  row.output_tokens = output;
  row.num_output_tokens = 3;
  EXPECT_EQ(sample_one(logits, row).token, 0);
  row.repetition_penalty = 2.5F;  // once a token, however often seen: 0.8, 0.76, -1, 1
  EXPECT_EQ(sample_one(logits, row).token, 3);
  row.repetition_penalty = 1.0F;
  row.presence_penalty = 0.5F;  // 1.5, 1.4, -1, 1
  EXPECT_EQ(sample_one(logits, row).token, 0);
  row.presence_penalty = 0.0F;
  row.frequency_penalty = 0.15F;  // 1.85, 1.6
  EXPECT_EQ(sample_one(logits, row).token, 0);
  row.frequency_penalty = -0.1F;  // 2.1, 2.1: equal up to rounding; make it clear
  row.presence_penalty = 0.0F;
  row.frequency_penalty = -0.2F;  // 2.2, 2.3
  EXPECT_EQ(sample_one(logits, row).token, 1);
  const TokenBias biases[] = {{2, 5.0F}};
  row.biases = biases;
  row.num_biases = 1;
  EXPECT_EQ(sample_one(logits, row).token, 2);
  const std::int32_t banned[] = {2, 1};
  row.banned_tokens = banned;
  row.num_banned_tokens = 2;
  EXPECT_EQ(sample_one(logits, row).token, 0);
  row.temperature = 5.0F;
  for (const auto& [token, count] : histogram(logits, row, 300)) {
    EXPECT_TRUE(token == 0 || token == 3) << token;
  }
  const std::int32_t all[] = {0, 1, 2, 3};
  row.banned_tokens = all;
  row.num_banned_tokens = 4;
  EXPECT_FALSE(sample_one(logits, row).is_finite) << "nothing is left to choose";
}

TEST_P(SampleTest, ADrawIsAFunctionOfSeedAndPosition) {
  const Matrix logits = Matrix::random(6, 3000, rng_, 0.3F);
  std::vector<SamplingRow> rows(6);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i] = {.temperature = 0.9F, .top_p = i % 2 == 0 ? 1.0F : 0.9F, .seed = 5, .position = i};
  }
  std::vector<SampledToken> together(6);
  ops().sample(together, logits.view(), rows, stream());
  for (const int num_threads : thread_counts()) {
    OpenedBackend other(GetParam(), num_threads);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      SampledToken alone;
      const Matrix one = logits.slice(static_cast<std::int64_t>(i), 1);
      other.ops.sample(std::span(&alone, 1), one.view(), std::span(&rows[i], 1), *other.stream);
      EXPECT_EQ(alone.token, together[i].token);
    }
  }
  const Matrix flat(1, 3000, 0.0F);
  std::set<std::int32_t> by_seed, by_position;
  for (std::uint64_t i = 0; i < 50; ++i) {
    by_seed.insert(sample_one(flat, {.seed = i}).token);
    by_position.insert(sample_one(flat, {.seed = 1, .position = i}).token);
  }
  EXPECT_GT(by_seed.size(), 40u);
  EXPECT_GT(by_position.size(), 40u);
}

TEST_P(SampleTest, NonFiniteLogitsAreFound) {
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    for (const std::int64_t place : {0, 5, 99}) {
      Matrix logits = Matrix::random(1, 100, rng_);
      logits.data()[place] = bad;
      EXPECT_FALSE(sample_one(logits, kGreedy).is_finite);
      EXPECT_FALSE(sample_one(logits, {.temperature = 1.0F}).is_finite);
    }
  }
  const float minus = -std::numeric_limits<float>::infinity();
  EXPECT_FALSE(sample_one(Matrix(1, 33, minus), kGreedy).is_finite);
  const SampledToken out = sample_one(row_of({minus, 1.0F, minus}), {.temperature = 1.0F});
  EXPECT_TRUE(out.is_finite);
  EXPECT_EQ(out.token, 1);
}

// What was chosen is the next step's token before the host knows it.
TEST_P(SampleTest, EmbedTakesChosenTokensFromTheDevice) {
  constexpr std::int64_t kRows = 5, kVocab = 300, kHidden = 64;
  const Matrix values = Matrix::random(kRows, kVocab, rng_);
  const DeviceMatrix logits(backend(), stream(), kRows, kVocab, DType::kFloat32);
  backend().copy_to_device(logits.view().data, values.data(), logits.view().num_bytes(), stream());
  const Buffer memory = backend().allocate(kRows * sizeof(std::int32_t));
  const std::span tokens(static_cast<std::int32_t*>(memory.data()), std::size_t{kRows});
  const std::vector<SamplingRow> rows(kRows, kGreedy);
  std::vector<SampledToken> chosen(kRows);
  backend().ops().sample(chosen, logits.view(), rows, stream(), tokens);

  const Weight table(backend(), stream(), kVocab, kHidden, DType::kBFloat16, rng_);
  const std::vector<const DeltaMatrix*> none(kRows, nullptr);
  const DType dtype = backend().activation_dtype(DType::kBFloat16);
  const DeviceMatrix unknown(backend(), stream(), kRows, kHidden, dtype);
  const std::vector<std::int32_t> names{~4, 7, ~0, ~0, ~2};
  backend().ops().embed(unknown.view(), names, table.packed, none, stream(), tokens);
  const std::unique_ptr<Event> computed = backend().create_event();
  computed->record(stream());
  computed->synchronize();
  const std::vector<std::int32_t> known{chosen[4].token, 7, chosen[0].token, chosen[0].token,
                                        chosen[2].token};
  const DeviceMatrix expected(backend(), stream(), kRows, kHidden, dtype);
  backend().ops().embed(expected.view(), known, table.packed, none, stream());
  EXPECT_EQ(unknown.download(), expected.download());
  EXPECT_TRUE(unknown.guards_intact());

  const std::vector<std::int32_t> beyond{0, 1, 2, 3, ~5};
  EXPECT_THROW(backend().ops().embed(unknown.view(), beyond, table.packed, none, stream(), tokens),
               InvalidArgument);
  EXPECT_THROW(backend().ops().sample(chosen, logits.view(), rows, stream(), tokens.first(4)),
               InvalidArgument);
}

TEST_P(SampleTest, ASmallTemperatureIsGreedy) {
  const Matrix logits = row_of({1.0F, 1.001F, 0.0F});
  EXPECT_EQ(sample_one(logits, {.temperature = 1e-40F}).token, 1);
  EXPECT_EQ(sample_one(logits, {.temperature = 1e-5F}).token, 1);
}

// One launch of all that a row may ask for; a sanitizer takes seconds for each launch.
TEST_P(SampleTest, SmallRowsOfEveryKind) {
  constexpr std::int64_t kVocab = 300;
  const std::int32_t history[] = {7, 7, 250, 0};
  const TokenBias biases[] = {{299, 3.0F}, {4, -2.0F}};
  const std::int32_t banned[] = {1, 298};
  SamplingRow asks{.temperature = 0.8F, .repetition_penalty = 1.3F, .frequency_penalty = 0.2F};
  asks.prompt_tokens = asks.output_tokens = history;
  asks.num_prompt_tokens = asks.num_output_tokens = 4;
  asks.biases = biases;
  asks.num_biases = 2;
  asks.banned_tokens = banned;
  asks.num_banned_tokens = 2;
  SamplingRow scored = kGreedy;
  scored.forced_token = 17;
  scored.num_logprobs = 5;
  const std::vector<SamplingRow> rows{
      kGreedy,
      {.temperature = 1.0F, .seed = 3},
      {.temperature = 1.0F, .top_p = 0.8F, .seed = 4},
      {.temperature = 1.0F, .top_k = 9, .top_p = 0.7F, .min_p = 0.01F, .seed = 5},
      asks,
      scored};
  const auto num_rows = static_cast<std::int64_t>(rows.size());
  const Matrix logits = Matrix::random(num_rows, kVocab, rng_, 2.0F);
  std::vector<SampledToken> drawn(rows.size()), expected(rows.size());
  ops().sample(drawn, logits.view(), rows, stream());
  OpenedBackend reference("cpu/scalar", 1);
  reference.ops.sample(expected, logits.view(), rows, *reference.stream);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(drawn[i].token, expected[i].token) << "row " << i;
    EXPECT_TRUE(drawn[i].is_finite) << "row " << i;
    EXPECT_EQ(drawn[i].rank, expected[i].rank) << "row " << i;
    EXPECT_NEAR(drawn[i].logprob, expected[i].logprob, 1e-5) << "row " << i;
    ASSERT_EQ(drawn[i].num_top, expected[i].num_top) << "row " << i;
    EXPECT_TRUE(std::equal(drawn[i].top_tokens, drawn[i].top_tokens + drawn[i].num_top,
                           expected[i].top_tokens));
  }
  EXPECT_EQ(drawn.back().num_top, 5);
}

TEST_P(SampleTest, RefusesWhatIsOutOfRange) {
  const Matrix logits(1, 8, 0.0F);
  const auto refuses = [&](const SamplingRow& row) {
    EXPECT_THROW(sample_one(logits, row), InvalidArgument);
  };
  refuses({.temperature = -1.0F});
  refuses({.temperature = std::nanf("")});
  refuses({.top_p = 0.0F});
  refuses({.top_p = 1.1F});
  refuses({.min_p = -0.1F});
  refuses({.repetition_penalty = 0.0F});
  refuses({.presence_penalty = std::nanf("")});
  refuses({.frequency_penalty = std::numeric_limits<float>::infinity()});
  refuses({.num_logprobs = kMaxLogprobs + 1});
  refuses({.num_logprobs = -2});
  refuses({.forced_token = 8});
  const std::int32_t outside[] = {8};
  refuses({.repetition_penalty = 2.0F, .prompt_tokens = outside, .num_prompt_tokens = 1});
  refuses({.presence_penalty = 2.0F, .output_tokens = outside, .num_output_tokens = 1});
  refuses({.banned_tokens = outside, .num_banned_tokens = 1});
  refuses({.num_banned_tokens = 1});
  const TokenBias far{-1, 0.0F}, endless{0, std::numeric_limits<float>::infinity()};
  refuses({.biases = &far, .num_biases = 1});
  refuses({.biases = &endless, .num_biases = 1});
  std::vector<SampledToken> out(2);
  const SamplingRow row;
  EXPECT_THROW(ops().sample(out, logits.view(), std::span(&row, 1), stream()), InvalidArgument);
}

}  // namespace
}  // namespace deltazip::testing
