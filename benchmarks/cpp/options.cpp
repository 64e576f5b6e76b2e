#include "options.h"

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "deltazip/base/error.h"

namespace deltazip::bench {
namespace {

constexpr const char* kUsage = R"(deltazip-bench-ops: microseconds, GB/s and GFLOP/s of single ops

  --op A,B          linear, linear_each (a dense product for each delta), sbmm, project (linear and
                    sbmm in one), attention, rope_append, rms_norm, silu_mul, sample
  --shape KxN,...   in_features x out_features; norms take K, silu_mul N (576x1536,...)
  --deltas D,...    variants in one launch, or sequences of attention (1,4)
  --tokens T,...    rows; of sbmm and project: of each delta          (1,4,16)
  --context C,...   keys of each sequence of attention                (64,256,1024)
  --heads Q/KxD     query heads, KV heads, head size                  (9/3x64)
  --vocab V         logits of a row                                   (49152)
  --format F,...    sparse24_int4 sparse24_int2 sparse24_ternary sparse14_sign dense_int4 dense_int8
  --dtype T         of base weights: bfloat16 float16 float32         (bfloat16)
  --group-size G    of deltas                                         (128)
  --device D        cpu, cuda, cuda:N                                 (cpu)
  --isa I           scalar avx2 avx512                                (the best)
  --threads T       0: one per core                                   (0)
  --rotate-mib M    operands are rotated so that caches do not flatter (64)
  --min-ms M        time per measurement                              (200)
  --json            one JSON object per line

GB/s counts weights and caches, each read once; its share is of what a copy on the device moves.
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
  for (const std::string& part : split(text)) {
    values.push_back(to_number(option, part));
    DZ_CHECK(values.back() > 0, option, ": expected numbers from 1 on, got '", text, "'");
  }
  DZ_CHECK(!values.empty(), option, ": expected numbers, got none");
  return values;
}

Heads to_heads(const std::string& option, std::string_view text) {
  const std::size_t slash = text.find('/'), x = text.find('x');
  DZ_CHECK(slash != std::string_view::npos && x != std::string_view::npos && slash < x, option,
           ": expected QUERY/KVxSIZE as in 32/8x128, got '", text, "'");
  const auto part = [&](std::string_view number) {
    return static_cast<std::int32_t>(to_number(option, number));
  };
  return {part(text.substr(0, slash)), part(text.substr(slash + 1, x - slash - 1)),
          part(text.substr(x + 1))};
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
      options.dtype = value;
    } else if (option == "--context") {
      options.contexts = to_numbers(option, value);
    } else if (option == "--heads") {
      options.heads = to_heads(option, value);
    } else if (option == "--vocab") {
      options.vocab = to_number(option, value);
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
