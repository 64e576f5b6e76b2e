// Not a test: what a decode step costs on the host, with a device that does nothing.
// step_cost [num_variants=32] [num_sequences=32] [num_layers=32] [prompt=128] [tokens=400]

#include <cstdio>
#include <cstdlib>
#include <string>

#include "backend/wrapped_backend.h"
#include "engine/harness.h"

namespace deltazip::test {
namespace {

class NullOps : public Ops {
 protected:
  void run(const EmbedParams&, Stream&) override {}
  void run(const LinearParams&, Stream&) override {}
  void run(const SbmmParams&, Stream&) override {}
  void run(const ProjectParams&, Stream&) override {}
  void run(const BiasAddParams&, Stream&) override {}
  void run(const RmsNormParams&, Stream&) override {}
  void run(const SiluMulParams&, Stream&) override {}
  void run(const RopeAppendParams&, Stream&) override {}
  void run(const PagedAttentionParams&, Stream&) override {}
  void run(const GatherRowsParams&, Stream&) override {}
  void run(const SampleParams& params, Stream&) override {
    for (std::int64_t i = 0; i < params.num_rows; ++i) params.out[i].token = 5;
  }
};

class NullBackend : public WrappedBackend {
 public:
  NullBackend() : WrappedBackend(make_backend("cpu", {1, {}})) {}
  Ops& ops() override { return ops_; }
  bool shares_host_memory() const override { return false; }
  std::int32_t padded_rows(std::int32_t num_rows) const override { return (num_rows + 7) / 8 * 8; }
  void run_step(const StepKey&, Stream&, const std::function<void()>& body) override { body(); }

 private:
  NullOps ops_;
};

int run(int num_variants, int num_sequences, int num_layers, int prompt, int num_tokens) {
  TinyHouse house(detail::concat(R"({"max_position_embeddings": 8192, "num_hidden_layers": )",
                                 num_layers, "}"));
  EngineConfig config = house.config();
  config.block_size = 16;
  config.kv_cache_bytes = std::int64_t{1} << 30;
  config.delta_budget_bytes = std::int64_t{1} << 30;
  config.max_batch_tokens = 8192;
  config.max_batch_sequences = 256;
  config.num_delta_slots = config.max_variants_per_batch = num_variants + 1;
  Engine engine(config, silent, std::make_unique<NullBackend>());
  for (int i = 0; i < num_variants; ++i) {
    const std::string name = detail::concat("v", i);
    engine.add_variant(name, house.write_variant(name, static_cast<std::uint32_t>(i)).string());
  }
  const auto requests = [&](std::int64_t first_id, int count, std::int32_t tokens) {
    std::vector<Request> out;
    for (int i = 0; i < count; ++i) {
      const std::string variant = num_variants == 0 ? "" : detail::concat("v", i % num_variants);
      out.push_back(make_request(first_id + i, variant,
                                 random_tokens(static_cast<std::size_t>(prompt), 1), tokens));
    }
    return out;
  };
  ask(engine, requests(0, num_variants + 1, 2));  // all deltas are loaded
  const std::int64_t num_before = engine.stats().num_steps;
  const auto start = std::chrono::steady_clock::now();
  ask(engine, requests(1000, num_sequences, num_tokens));
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const auto num_steps = static_cast<double>(engine.stats().num_steps - num_before);
  std::printf(
      "%d variants, %d sequences, %d layers, context %d to %d: %.0f steps, %.1f us a step\n",
      num_variants, num_sequences, num_layers, prompt, prompt + num_tokens, num_steps,
      seconds * 1e6 / num_steps);
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace deltazip::test

int main(int argc, char** argv) {
  int values[] = {32, 32, 32, 128, 400};
  for (int i = 1; i < argc && i <= 5; ++i) {
    values[i - 1] = std::atoi(argv[i]);  // NOLINT(cert-err34-c): a tool for developers
  }
  return deltazip::test::run(values[0], values[1], values[2], values[3], values[4]);
}
