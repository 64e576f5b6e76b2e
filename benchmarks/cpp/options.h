#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deltazip::bench {

struct BenchShape {
  std::int64_t columns, rows;  // K x N
};

struct Heads {
  std::int32_t query, kv, dim;
};

struct Options {
  std::string device = "cpu", isa;
  int num_threads = 0;
  std::vector<std::string> ops{"linear",   "sbmm",     "attention", "rope_append",
                               "rms_norm", "silu_mul", "sample"};
  std::vector<BenchShape> shapes{{576, 1536}, {1536, 576}, {576, 960}, {4096, 4096}};
  std::string dtype = "bfloat16";  // of base weights, and on a device of activations
  std::vector<std::string> formats{"sparse24_int4", "sparse24_int2", "sparse24_ternary"};
  std::vector<std::int64_t> deltas{1, 4}, tokens{1, 4, 16}, contexts{64, 256, 1024};
  Heads heads{9, 3, 64};
  std::int64_t vocab = 49152, group_size = 128, rotate_mib = 64, min_ms = 200;
  bool json = false;
};

// Throws InvalidArgument naming the option; prints the usage and exits on --help.
Options parse_options(int argc, char** argv);

}  // namespace deltazip::bench
