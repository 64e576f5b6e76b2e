#include "options.h"

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "deltazip/base/error.h"

namespace deltazip::bench {
namespace {

constexpr const char* kUsage = R"(deltazip-bench-ops: microseconds, GB/s and GFLOP/s of single ops

  --op A,B          linear sbmm attention rms_norm silu_mul sample   (all)
  --shape KxN,...   in_features x out_features                      (576x1536,...)
  --deltas D,...    variants in one launch (sbmm) or sequences (attention)
  --tokens T,...    rows: of linear; per delta of sbmm; context length x 64 of attention
  --format F,...    sparse24_int4 sparse24_int2 sparse24_ternary dense_int4 dense_int8
  --dtype T,...     of base weights: bfloat16 float16 float32       (bfloat16)
  --group-size G    of deltas                                       (128)
  --device D        cpu, cuda, cuda:N                               (cpu)
  --isa I           scalar avx2 avx512                              (the best)
  --threads T       0: one per core                                 (0)
  --rotate-mib M    weights are rotated so that caches do not flatter (64)
  --min-ms M        time per measurement                            (200)
  --json            one JSON object per line
)";

std::vector<std::string> split(std::string_view text) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    const std::size_t comma = text.find(',');
    parts.emplace_back(text.substr(0, comma));
    text = comma == std::string_view::npos ? "" : text.substr(comma + 1);
  }
  return parts;
}

std::int64_t to_number(const std::string& option, std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  DZ_CHECK(error == std::errc() && end == text.data() + text.size() && value >= 0, option,
           ": expected a number, got '", text, "'");
  return value;
}

std::vector<std::int64_t> to_numbers(const std::string& option, std::string_view text) {
  std::vector<std::int64_t> values;
  for (const std::string& part : split(text)) values.push_back(to_number(option, part));
  return values;
}

}  // namespace

Options parse_options(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--help" || option == "-h") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    }
    if (option == "--json") {
      options.json = true;
      continue;
    }
    DZ_CHECK(i + 1 < argc, "option ", option, " is unknown or lacks its value");
    const std::string value = argv[++i];
    if (option == "--op") {
      options.ops = split(value);
    } else if (option == "--shape") {
      options.shapes.clear();
      for (const std::string& part : split(value)) {
        const std::size_t x = part.find('x');
        DZ_CHECK(x != std::string::npos, "--shape: expected KxN, got '", part, "'");
        options.shapes.push_back(
            {to_number(option, part.substr(0, x)), to_number(option, part.substr(x + 1))});
      }
    } else if (option == "--deltas") {
      options.deltas = to_numbers(option, value);
    } else if (option == "--tokens") {
      options.tokens = to_numbers(option, value);
    } else if (option == "--format") {
      options.formats = split(value);
    } else if (option == "--dtype") {
      options.dtypes = split(value);
    } else if (option == "--group-size") {
      options.group_size = to_number(option, value);
    } else if (option == "--device") {
      options.device = value;
    } else if (option == "--isa") {
      options.isa = value;
    } else if (option == "--threads") {
      options.num_threads = static_cast<int>(to_number(option, value));
    } else if (option == "--rotate-mib") {
      options.rotate_mib = to_number(option, value);
    } else if (option == "--min-ms") {
      options.min_ms = to_number(option, value);
    } else {
      detail::fail<InvalidArgument>("unknown option ", option, "; see --help");
    }
  }
  return options;
}

}  // namespace deltazip::bench
