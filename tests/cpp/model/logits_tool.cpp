// Runs token lists through a model folder and writes raw logits, for comparisons from Python.
//   deltazip_logits MODEL --tokens FILE --out FILE [--delta PATH] [--argmax] [--chunk N]
//                   [--threads N] [--kv-dtype NAME] [--device NAME [--dtype NAME]]
//   deltazip_logits MODEL --tokens FILE --out FILE --generate STEPS [--delta PATH] [...]
//   deltazip_logits MODEL --decode STEPS [--context N] [--delta PATH] [--threads N]
// FILE has one sequence a line, ids apart by blanks. The output is, for every position of every
// sequence, [vocab_size] float32, or with --argmax one int32, or with --generate the STEPS
// likeliest tokens after each sequence, int32, all sequences in one batch. --decode times
// single-row steps.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "deltazip/base/error.h"
#include "deltazip/delta/delta_store.h"
#include "model/harness.h"

namespace deltazip::test {
namespace {

using Tokens = std::vector<std::int32_t>;

struct Arguments {
  std::string model;
  std::map<std::string, std::string> options;

  std::string text(const std::string& key, const std::string& fallback = "") const {
    const auto it = options.find(key);
    return it == options.end() ? fallback : it->second;
  }
  std::int32_t number(const std::string& key, std::int32_t fallback) const {
    const std::string value = text(key);
    return value.empty() ? fallback : std::stoi(value);
  }
};

Arguments read_arguments(int argc, char** argv) {
  DZ_CHECK(argc >= 2, "expected a model folder");
  Arguments out;
  out.model = argv[1];
  for (int i = 2; i < argc; ++i) {
    const std::string key = argv[i];
    if (key == "--argmax") {
      out.options.emplace(key, "yes");
      continue;
    }
    DZ_CHECK(key.starts_with("--") && i + 1 < argc, "expected --option value, got ", key);
    out.options[key] = argv[++i];
  }
  return out;
}

std::vector<Tokens> read_sequences(const std::string& path) {
  std::ifstream file(path);
  DZ_CHECK(file.good(), "cannot read '", path, "'");
  std::vector<Tokens> out;
  for (std::string line; std::getline(file, line);) {
    std::istringstream in(line);
    Tokens tokens;
    for (std::int32_t token = 0; in >> token;) tokens.push_back(token);
    if (!tokens.empty()) out.push_back(std::move(tokens));
  }
  return out;
}

DType dtype_named(const std::string& text) {
  const std::optional<DType> known = dtype_from_name(text);
  DZ_CHECK(known.has_value(), "unknown dtype '", text, "'");
  return *known;
}

std::int32_t argmax(const float* row, std::size_t size) {
  return static_cast<std::int32_t>(std::max_element(row, row + size) - row);
}

void write_logits(Harness& harness, const Arguments& arguments, const VariantWeights* variant) {
  std::ofstream out(arguments.text("--out"), std::ios::binary);
  DZ_CHECK(out.good(), "cannot write '", arguments.text("--out"), "'");
  const auto vocab = static_cast<std::size_t>(harness.model().config().vocab_size);
  const auto chunk = static_cast<std::size_t>(arguments.number("--chunk", 256));
  for (const Tokens& tokens : read_sequences(arguments.text("--tokens"))) {
    const std::vector<float> logits = harness.run(tokens, chunk, variant);
    if (arguments.text("--argmax").empty()) {
      out.write(reinterpret_cast<const char*>(logits.data()),
                static_cast<std::streamsize>(logits.size() * sizeof(float)));
      continue;
    }
    for (std::size_t at = 0; at < logits.size(); at += vocab) {
      const std::int32_t best = argmax(logits.data() + at, vocab);
      out.write(reinterpret_cast<const char*>(&best), sizeof(best));
    }
  }
}

void write_greedy(Harness& harness, const Arguments& arguments, const VariantWeights* variant) {
  std::ofstream out(arguments.text("--out"), std::ios::binary);
  DZ_CHECK(out.good(), "cannot write '", arguments.text("--out"), "'");
  const auto vocab = static_cast<std::size_t>(harness.model().config().vocab_size);
  std::vector<Harness::Chunk> chunks;
  std::vector<Tokens> chosen;
  for (const Tokens& tokens : read_sequences(arguments.text("--tokens"))) {
    const std::int32_t id = harness.add_sequence(variant);
    const std::vector<float> logits = harness.step({{id, tokens}}, true)[0];
    chosen.push_back({argmax(logits.data(), vocab)});
    chunks.push_back({id, chosen.back()});
  }
  for (std::int32_t step = 1; step < arguments.number("--generate", 64); ++step) {
    const std::vector<std::vector<float>> logits = harness.step(chunks, true);
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      chosen[i].push_back(argmax(logits[i].data(), vocab));
      chunks[i].tokens = {chosen[i].back()};
    }
  }
  for (const Tokens& tokens : chosen) {
    out.write(reinterpret_cast<const char*>(tokens.data()),
              static_cast<std::streamsize>(tokens.size() * sizeof(std::int32_t)));
  }
}

void time_decode(Harness& harness, const Arguments& arguments, const VariantWeights* variant) {
  const std::int32_t steps = arguments.number("--decode", 64);
  const std::int32_t context = arguments.number("--context", 32);
  const auto vocab = static_cast<std::size_t>(harness.model().config().vocab_size);
  const std::int32_t id = harness.add_sequence(variant);
  Tokens prompt;
  for (std::int32_t i = 0; i < context; ++i) prompt.push_back((7 * i + 1) % 1000);
  std::int32_t next = argmax(harness.step({{id, prompt}}, true)[0].data(), vocab);
  std::vector<double> milliseconds;
  for (std::int32_t i = 0; i < steps; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const std::vector<std::vector<float>> logits = harness.step({{id, {next}}}, true);
    next = argmax(logits[0].data(), vocab);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    milliseconds.push_back(took.count());
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  const double median = milliseconds[milliseconds.size() / 2];
  const auto bytes = static_cast<double>(harness.model().weight_bytes());
  std::printf("%s: %d steps, median %.3f ms (%.1f tokens/s, %.1f GB/s of weights), best %.3f ms\n",
              harness.backend().description().c_str(), steps, median, 1000.0 / median,
              bytes / median / 1e6, milliseconds.front());
}

// A delta file, taken the way the engine takes it: store, slot, pointers.
class Variant {
 public:
  Variant(Harness& harness, const std::string& base, const std::string& path)
      : checkpoint_(Checkpoint::open(base)),
        store_(harness.backend(), digest_of(checkpoint_), Model::base_tensors(checkpoint_), 0),
        cache_(harness.backend(), store_, 1) {
    Model::check_servable(harness.model().config(), *DeltaFile::open(path));
    cache_.begin_load(0, store_.add(path));
    std::vector<DeltaCache::Finished> finished;
    while (finished.empty()) {
      cache_.wait(1000);
      finished = cache_.poll();
    }
    DZ_CHECK(finished[0].error.empty(), finished[0].error);
    weights_ = harness.model().bind(*cache_.get(0));
  }
  const VariantWeights* weights() const { return weights_.get(); }

 private:
  static Digest digest_of(const Checkpoint& checkpoint) {
    ThreadPool pool(0);
    return checkpoint.weights_digest(pool);
  }

  Checkpoint checkpoint_;
  DeltaStore store_;
  DeltaCache cache_;
  std::shared_ptr<const VariantWeights> weights_;
};

int run(int argc, char** argv) {
  const Arguments arguments = read_arguments(argc, argv);
  Harness::Options options;
  options.backend.num_threads = arguments.number("--threads", 0);
  options.backend.isa = arguments.text("--isa");
  options.max_batch_tokens = 256;
  options.block_size = 16;
  options.num_blocks = 512;
  options.device = arguments.text("--device", "cpu");
  const std::string dtype = arguments.text("--dtype", "bfloat16");
  options.backend.compute_dtype = dtype_named(dtype);
  const char* kv_default = options.device == "cpu" ? "float32" : dtype.c_str();
  options.kv_dtype = dtype_named(arguments.text("--kv-dtype", kv_default));
  Harness harness(arguments.model, options);

  std::optional<Variant> variant;
  if (const std::string path = arguments.text("--delta"); !path.empty()) {
    variant.emplace(harness, arguments.model, path);
  }
  const VariantWeights* weights = variant ? variant->weights() : nullptr;
  if (!arguments.text("--decode").empty()) {
    time_decode(harness, arguments, weights);
  } else if (!arguments.text("--generate").empty()) {
    write_greedy(harness, arguments, weights);
  } else {
    write_logits(harness, arguments, weights);
  }
  return 0;
}

}  // namespace
}  // namespace deltazip::test

int main(int argc, char** argv) {
  try {
    return deltazip::test::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "deltazip_logits: " << error.what() << "\n";
    return 2;
  }
}
