// One op at a time, on any backend: shapes, deltas, tokens and formats are swept.

#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>

#include "bench.h"
#include "deltazip/base/error.h"

namespace deltazip::bench {
namespace {

using Op = std::pair<std::string_view, void (*)(Bench&)>;
constexpr std::array kOps{
    Op{"linear", bench_linear},       Op{"linear_each", bench_linear_each},
    Op{"sbmm", bench_sbmm},           Op{"project", bench_project},
    Op{"attention", bench_attention}, Op{"rope_append", bench_rope_append},
    Op{"rms_norm", bench_rms_norm},   Op{"silu_mul", bench_silu_mul},
    Op{"sample", bench_sample},
};

void run(const Options& options) {
  for (const std::string& op : options.ops) {
    const bool is_known =
        std::any_of(kOps.begin(), kOps.end(), [&](const auto& entry) { return entry.first == op; });
    DZ_CHECK(is_known, "--op: unknown op '", op, "'; see --help");
  }
  Bench bench(options);
  bench.print_header();
  for (const std::string& op : options.ops) {
    for (const auto& [name, body] : kOps) {
      if (name == op) body(bench);
    }
  }
}

}  // namespace
}  // namespace deltazip::bench

int main(int argc, char** argv) {
  try {
    deltazip::bench::run(deltazip::bench::parse_options(argc, argv));
    return 0;
  } catch (const deltazip::Error& error) {
    std::fprintf(stderr, "deltazip-bench-ops: %s\n", error.what());
    return 2;
  }
}
