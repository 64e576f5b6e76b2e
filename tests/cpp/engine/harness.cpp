#include "engine/harness.h"

#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <thread>

#include "deltazip/io/checkpoint.h"

namespace deltazip::test {
namespace {

constexpr auto kPatience = std::chrono::seconds(60);

std::string text_of(const void* data, std::size_t num_bytes) {
  return {static_cast<const char*>(data), num_bytes};
}

std::string shape_text(const Shape& shape) {
  std::string text;
  for (int axis = 0; axis < shape.rank(); ++axis) {
    if (axis > 0) text += ',';
    text += std::to_string(shape[axis]);
  }
  return text;
}

}  // namespace

TinyHouse::TinyHouse(const std::string& config_patch, std::uint32_t seed)
    : model(make_tiny_model(config_patch, seed)) {
  model.write(base());
}

EngineConfig TinyHouse::config() const {
  EngineConfig config;
  config.base = base().string();
  config.num_threads = 2;
  config.block_size = 4;
  config.kv_cache_bytes = 4 << 20;
  config.delta_budget_bytes = 1 << 20;
  config.max_batch_tokens = 32;
  config.max_batch_sequences = 8;
  return config;
}

TinyDelta TinyHouse::delta(std::uint32_t seed) const {
  TinyDelta delta;
  std::uint32_t next = 1000 * seed;
  std::mt19937 random(seed);
  constexpr DeltaType kTypes[] = {DeltaType::kSparse24Int4,    DeltaType::kSparse24Int2,
                                  DeltaType::kSparse24Ternary, DeltaType::kDenseInt4,
                                  DeltaType::kDenseInt8,       DeltaType::kSparse14Sign};
  constexpr float kSizes[] = {0.02F, 0.05F, 0.1F, 0.02F, 0.001F, 0.1F};  // of one unit of the codes
  for (const auto& [name, tensor] : model.tensors) {
    if (tensor.shape.rank() == 2) {
      const std::uint32_t type = draw(random, 6);
      delta.matrices.emplace(name, make_tiny_delta_matrix(kTypes[type], tensor.shape[0],
                                                          tensor.shape[1], kSizes[type], next++));
    } else {
      std::vector<float> values = tensor.values;
      for (float& value : values) value *= 1.0F + 0.01F * static_cast<float>(draw(random, 10));
      delta.replaced.emplace(name, std::move(values));
    }
  }
  return delta;
}

std::filesystem::path TinyHouse::write_variant(const std::string& name, std::uint32_t seed) const {
  const std::filesystem::path folder = folder_.path() / name;
  ThreadPool pool(1);
  write_delta(delta(seed), model, Checkpoint::open(base()).weights_digest(pool), folder);
  return folder;
}

void write_delta(const TinyDelta& delta, const TinyModel& model, const Digest& base_digest,
                 const std::filesystem::path& folder) {
  using Stored = SafetensorsBuilder::Tensor;
  std::map<std::string, Stored> stored;
  const auto store = [&](const std::string& name, const char* dtype, const Shape& shape,
                         std::string data) {
    stored[name] = {name, dtype, detail::concat("[", shape_text(shape), "]"), std::move(data)};
  };
  nlohmann::json tensors;
  Sha256 content;
  const std::string nul(1, '\0');
  content.update("deltazip.delta.v1" + nul + base_digest.hex() + nul);
  for (const auto& [name, tensor] : model.tensors) {
    nlohmann::json entry = {{"type", "unchanged"}};
    std::int32_t group_size = 0;
    if (const auto found = delta.matrices.find(name); found != delta.matrices.end()) {
      const TinyDeltaMatrix& matrix = found->second;
      const std::int64_t rows = tensor.shape[0];
      const auto row_bytes = [&](const std::vector<std::byte>& bytes) {
        return static_cast<std::int64_t>(bytes.size()) / rows;
      };
      entry["type"] = deltazip::name(matrix.type);
      entry["group_size"] = group_size = matrix.group_size;
      store(name + (has_states(matrix.type) ? ".codes" : ".values"), "U8",
            {rows, row_bytes(matrix.values)}, text_of(matrix.values.data(), matrix.values.size()));
      if (!matrix.indices.empty()) {
        store(name + ".indices", "U8", {rows, row_bytes(matrix.indices)},
              text_of(matrix.indices.data(), matrix.indices.size()));
      }
      store(name + ".scales", "F16", {rows, row_bytes(matrix.scales) / 2},
            text_of(matrix.scales.data(), matrix.scales.size()));
    } else if (const auto values = delta.replaced.find(name); values != delta.replaced.end()) {
      entry["type"] = "replaced";
      store(name, "F32", tensor.shape,
            text_of(values->second.data(), values->second.size() * sizeof(float)));
    }
    for (int axis = 0; axis < tensor.shape.rank(); ++axis) {
      entry["shape"].push_back(tensor.shape[axis]);
    }
    content.update(name + nul + entry["type"].get<std::string>() + nul + shape_text(tensor.shape) +
                   nul + std::to_string(group_size) + nul);
    tensors[name] = entry;
  }
  for (const auto& [name, tensor] : stored) {
    const Digest digest = sha256(std::as_bytes(std::span(tensor.data)));
    content.update(name + nul + tensor.dtype + nul);
    content.update(std::as_bytes(std::span(digest.bytes)));
  }

  const nlohmann::json manifest = {{"version", 1},
                                   {"base_digest", base_digest.hex()},
                                   {"content_digest", content.finish().hex()},
                                   {"tensors", tensors}};
  SafetensorsBuilder file;
  for (const char* dtype : {"F32", "F16", "U8"}) {  // widest first keeps all of them aligned
    for (const auto& [name, tensor] : stored) {
      if (tensor.dtype == dtype) file.tensors.push_back(tensor);
    }
  }
  const std::string quoted = nlohmann::json(manifest.dump()).dump();
  file.metadata = {{"format", "deltazip"}, {"manifest", quoted.substr(1, quoted.size() - 2)}};
  std::filesystem::create_directories(folder);
  write_file(folder / "delta.safetensors", file.str());
}

Request make_request(std::int64_t id, const std::string& variant, Tokens prompt,
                     std::int32_t max_tokens) {
  Request request;
  request.id = id;
  request.variant = variant;
  request.prompt = std::move(prompt);
  request.sampling.temperature = 0.0F;
  request.sampling.max_tokens = max_tokens;
  request.sampling.ignore_eos = true;
  return request;
}

void add_event(Answers& answers, OutputEvent&& event) {
  Answer& answer = answers[{event.request_id, event.choice}];
  EXPECT_EQ(answer.finish, Finish::kNone) << "an event after the last one";
  answer.tokens.insert(answer.tokens.end(), event.tokens.begin(), event.tokens.end());
  for (TokenLogprobs& each : event.logprobs) answer.logprobs.push_back(std::move(each));
  for (auto& each : event.prompt_logprobs) answer.prompt_logprobs.push_back(std::move(each));
  answer.finish = event.finish;
  answer.num_finishes += event.finish != Finish::kNone ? 1 : 0;
  if (event.stop_token >= 0) answer.stop_token = event.stop_token;
  if (!event.error.empty()) answer.error = event.error;
  answer.num_cached_prompt_tokens =
      std::max(answer.num_cached_prompt_tokens, event.num_cached_prompt_tokens);
}

void collect(Engine& engine, std::size_t num_choices, Answers& answers) {
  const auto give_up = std::chrono::steady_clock::now() + kPatience;
  const auto num_finished = [&] {
    return std::ranges::count_if(
        answers, [](const auto& each) { return each.second.finish != Finish::kNone; });
  };
  while (static_cast<std::size_t>(num_finished()) < num_choices) {
    for (OutputEvent& event : engine.poll(64, 50)) add_event(answers, std::move(event));
    ASSERT_LT(std::chrono::steady_clock::now(), give_up)
        << num_finished() << " of " << num_choices << " finished";
  }
}

Answers ask(Engine& engine, std::vector<Request> requests) {
  std::size_t num_choices = 0;
  for (Request& request : requests) {
    num_choices += static_cast<std::size_t>(request.sampling.n);
    engine.submit(std::move(request));
  }
  Answers answers;
  collect(engine, num_choices, answers);
  return answers;
}

Answer ask_one(Engine& engine, Request request) { return only(ask(engine, {std::move(request)})); }

void wait_until(const std::function<bool()>& is_true, const char* what) {
  const auto give_up = std::chrono::steady_clock::now() + kPatience;
  while (!is_true()) {
    ASSERT_LT(std::chrono::steady_clock::now(), give_up) << what;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void silent(LogLevel, std::string_view) {}

}  // namespace deltazip::test
