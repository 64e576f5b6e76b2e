#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "deltazip/engine/engine.h"
#include "io/safetensors_builder.h"
#include "model/tiny_delta.h"
#include "model/tiny_model.h"

namespace deltazip::test {

using Finish = OutputEvent::Finish;
using Tokens = std::vector<std::int32_t>;

// All that came out for one choice.
struct Answer {
  Tokens tokens;
  std::vector<TokenLogprobs> logprobs;
  std::vector<std::optional<TokenLogprobs>> prompt_logprobs;
  Finish finish = Finish::kNone;
  std::int32_t num_finishes = 0;
  std::int32_t stop_token = -1;
  std::string error;
  std::int32_t num_cached_prompt_tokens = 0;
};
using Answers = std::map<std::pair<std::int64_t, std::int32_t>, Answer>;  // by id, choice

// A tiny base in a folder of its own, variants beside it, and an engine's settings for it.
class TinyHouse {
 public:
  explicit TinyHouse(const std::string& config_patch = "{}", std::uint32_t seed = 1);

  std::filesystem::path base() const { return folder_.path() / "base"; }
  // Writes a delta of the base and returns its folder. `seed` makes its content.
  std::filesystem::path write_variant(const std::string& name, std::uint32_t seed) const;
  TinyDelta delta(std::uint32_t seed) const;
  EngineConfig config() const;

  TinyModel model;

 private:
  TemporaryFolder folder_;
};

// As docs/delta_format.md has it, digests included.
void write_delta(const TinyDelta& delta, const TinyModel& model, const Digest& base_digest,
                 const std::filesystem::path& folder);

Request make_request(std::int64_t id, const std::string& variant, Tokens prompt,
                     std::int32_t max_tokens);
inline const Answer& only(const Answers& answers) { return answers.begin()->second; }

void add_event(Answers& answers, OutputEvent&& event);
// Polls until `num_choices` have finished in all; fails the test after a minute.
void collect(Engine& engine, std::size_t num_choices, Answers& answers);
// Submits all and waits for all.
Answers ask(Engine& engine, std::vector<Request> requests);
Answer ask_one(Engine& engine, Request request);
// Until `is_true`, or a failed test after a minute.
void wait_until(const std::function<bool()>& is_true, const char* what);

void silent(LogLevel level, std::string_view message);  // a LogSink

}  // namespace deltazip::test
