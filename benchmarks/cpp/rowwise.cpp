// Ops that take each row by itself.

#include <string>
#include <vector>

#include "bench.h"

namespace deltazip::bench {
namespace {

constexpr std::int64_t kTurns = 16;

}  // namespace

void bench_rms_norm(Bench& bench) {
  for (const BenchShape& shape : bench.options().shapes) {
    const std::int64_t size = shape.columns;
    for (const std::int64_t rows : bench.options().tokens) {
      const Buffer x = bench.random(rows * size, bench.activations());
      const Buffer residual = bench.random(rows * size, bench.activations());
      const Buffer out = bench.random(rows * size, bench.activations());
      const Buffer gain = bench.random(size, DType::kFloat32);
      const std::vector<const float*> gains(static_cast<std::size_t>(rows),
                                            static_cast<const float*>(gain.data()));
      const auto item = static_cast<double>(size_of(bench.activations()));
      const Label label{"rms_norm", std::string(name(bench.activations())),        size, size, 0,
                        rows,       4.0 * item * static_cast<double>(rows * size), 0.0};
      bench.measure(label, kTurns, [&](std::int64_t) {
        bench.backend().ops().rms_norm(bench.view(out, rows, size),
                                       bench.view(residual, rows, size), bench.view(x, rows, size),
                                       gains, 1e-5F, bench.stream());
      });
    }
  }
}

void bench_silu_mul(Bench& bench) {
  for (const BenchShape& shape : bench.options().shapes) {
    const std::int64_t size = shape.rows;
    for (const std::int64_t rows : bench.options().tokens) {
      const Buffer x = bench.random(rows * 2 * size, bench.activations());
      const Buffer out = bench.random(rows * size, bench.activations());
      const auto item = static_cast<double>(size_of(bench.activations()));
      const Label label{
          "silu_mul", std::string(name(bench.activations())),        2 * size, size, 0,
          rows,       3.0 * item * static_cast<double>(rows * size), 0.0};
      bench.measure(label, kTurns, [&](std::int64_t) {
        bench.backend().ops().silu_mul(bench.view(out, rows, size), bench.view(x, rows, 2 * size),
                                       bench.stream());
      });
    }
  }
}

void bench_sample(Bench& bench) {
  const std::int64_t size = bench.options().vocab;
  for (const std::int64_t rows : bench.options().tokens) {
    const Buffer logits = bench.random(rows * size, DType::kFloat32);
    for (const bool is_greedy : {true, false}) {
      std::vector<SamplingRow> sampling(static_cast<std::size_t>(rows));
      for (SamplingRow& row : sampling) {
        row.temperature = is_greedy ? 0.0F : 0.8F;
        row.top_p = is_greedy ? 1.0F : 0.95F;
      }
      std::vector<SampledToken> tokens(sampling.size());
      const Label label{"sample", is_greedy ? "greedy" : "top_p",         size, 1, 0,
                        rows,     4.0 * static_cast<double>(rows * size), 0.0};
      // Its results come to the host, so it ends a step and is no part of what is replayed.
      bench.measure(
          label, 1,
          [&](std::int64_t) {
            for (SamplingRow& row : sampling) ++row.position;
            bench.backend().ops().sample(tokens, {logits.data(), DType::kFloat32, {rows, size}},
                                         sampling, bench.stream());
          },
          false);
    }
  }
}

}  // namespace deltazip::bench
