// One op at a time, on any backend: shapes, deltas, tokens and formats are swept.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "deltazip/backend/backend.h"
#include "deltazip/base/error.h"
#include "options.h"

namespace deltazip::bench {
namespace {

using Clock = std::chrono::steady_clock;

class Bench {
 public:
  explicit Bench(const Options& options)
      : options_(options),
        backend_(
            make_backend(options.device, {.num_threads = options.num_threads, .isa = options.isa})),
        stream_(backend_->create_stream()) {}

  void run() {
    if (!options_.json) {
      std::printf("%s\n%-10s %-17s %-12s %6s %6s %12s %9s %9s\n", backend_->description().c_str(),
                  "op", "format", "KxN", "D", "tokens", "us", "GB/s", "GFLOP/s");
    }
    for (const std::string& op : options_.ops) {
      if (op == "linear") {
        linear();
      } else if (op == "sbmm") {
        sbmm();
      } else if (op == "attention") {
        attention();
      } else if (op == "rms_norm" || op == "silu_mul" || op == "sample") {
        rowwise(op);
      } else {
        detail::fail<InvalidArgument>("--op: unknown op '", op, "'; see --help");
      }
    }
  }

 private:
  Buffer random_floats(std::int64_t count) {
    std::vector<float> host(static_cast<std::size_t>(count));
    std::normal_distribution<float> normal;
    for (float& value : host) value = normal(rng_);
    Buffer buffer = backend_->allocate(host.size() * sizeof(float));
    backend_->copy_to_device(buffer.data(), host.data(), buffer.num_bytes(), *stream_);
    stream_->synchronize();
    return buffer;
  }
  // Enough copies that they do not fit the caches together.
  std::int64_t num_copies(std::size_t bytes) const {
    return 1 + (options_.rotate_mib << 20) / static_cast<std::int64_t>(bytes);
  }

  // Runs body(0), body(1), ... ; prints the median time of small batches.
  void measure(const std::string& op, const std::string& format, const BenchShape& shape,
               std::int64_t deltas, std::int64_t tokens, double bytes, double flops,
               const std::function<void(std::int64_t)>& body) {
    std::int64_t turn = 0;
    const auto seconds_of = [&](std::int64_t count) {
      const auto start = Clock::now();
      for (std::int64_t i = 0; i < count; ++i) body(turn++);
      stream_->synchronize();
      return std::chrono::duration<double>(Clock::now() - start).count();
    };
    const double first = std::max(seconds_of(2) / 2, 1e-7);
    const auto batch = std::max<std::int64_t>(1, static_cast<std::int64_t>(2e-3 / first));
    std::vector<double> times;
    for (double total = 0.0; total < 1e-3 * static_cast<double>(options_.min_ms);) {
      const double seconds = seconds_of(batch);
      total += seconds;
      times.push_back(seconds / static_cast<double>(batch));
    }
    std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2),
                     times.end());
    const double us = 1e6 * times[times.size() / 2];
    const double best_us = 1e6 * *std::min_element(times.begin(), times.end());
    const double gbs = bytes / us * 1e-3, gflops = flops / us * 1e-3;
    const auto size = std::to_string(shape.columns) + "x" + std::to_string(shape.rows);
    if (options_.json) {
      std::printf(
          "{\"op\":\"%s\",\"format\":\"%s\",\"columns\":%lld,\"rows\":%lld,\"deltas\":%lld,"
          "\"tokens\":%lld,\"us\":%.3f,\"best_us\":%.3f,\"gb_per_s\":%.3f,\"gflop_per_s\":%.3f,"
          "\"device\":\"%s\"}\n",
          op.c_str(), format.c_str(), static_cast<long long>(shape.columns),
          static_cast<long long>(shape.rows), static_cast<long long>(deltas),
          static_cast<long long>(tokens), us, best_us, gbs, gflops,
          backend_->description().c_str());
    } else {
      std::printf("%-10s %-17s %-12s %6lld %6lld %12.2f %9.2f %9.1f\n", op.c_str(), format.c_str(),
                  size.c_str(), static_cast<long long>(deltas), static_cast<long long>(tokens), us,
                  gbs, gflops);
    }
    std::fflush(stdout);
  }

  void linear() {
    for (const std::string& dtype_name : options_.dtypes) {
      const auto dtype = dtype_from_name(dtype_name);
      DZ_CHECK(dtype.has_value() && is_floating(*dtype), "--dtype: unknown dtype '", dtype_name,
               "'");
      for (const BenchShape& shape : options_.shapes) {
        const std::size_t bytes = backend_->packed_bytes(*dtype, shape.rows, shape.columns);
        std::vector<std::uint16_t> host(static_cast<std::size_t>(shape.rows * shape.columns) * 2);
        for (std::uint16_t& word : host) {  // around 0.01 as bf16, fp16 or the halves of floats
          word = static_cast<std::uint16_t>(0x3C00u | (rng_() & 0x80FFu));
        }
        std::vector<Buffer> weights;
        for (std::int64_t i = 0; i < num_copies(bytes); ++i) {
          weights.push_back(backend_->allocate(bytes));
          backend_->pack_weight(weights.back().data(),
                                {host.data(), *dtype, {shape.rows, shape.columns}}, *stream_);
        }
        for (const std::int64_t tokens : options_.tokens) {
          const Buffer x = random_floats(tokens * shape.columns);
          const Buffer y = random_floats(tokens * shape.rows);
          const double moved = static_cast<double>(shape.rows * shape.columns) *
                               static_cast<double>(size_of(*dtype));
          measure("linear", dtype_name, shape, 0, tokens, moved,
                  2.0 * static_cast<double>(shape.rows * shape.columns * tokens),
                  [&](std::int64_t turn) {
                    const Buffer& w = weights[static_cast<std::size_t>(turn) % weights.size()];
                    backend_->ops().linear({y.data(), DType::kFloat32, {tokens, shape.rows}},
                                           {x.data(), DType::kFloat32, {tokens, shape.columns}},
                                           {w.data(), *dtype, shape.rows, shape.columns}, *stream_);
                  });
        }
      }
    }
  }

  // A tiled delta of random codes and small positive scales.
  Buffer random_delta(DeltaType type, const BenchShape& shape) {
    const std::int64_t blocks = (shape.columns + 31) / 32;
    const std::int64_t groups = (shape.columns + options_.group_size - 1) / options_.group_size;
    constexpr std::int64_t kBlockBytes[] = {8, 4, 5, 16, 32};
    const auto bytes_of = [](std::int64_t count) {
      return std::vector<std::byte>(static_cast<std::size_t>(count));
    };
    std::vector<std::byte> values =
        bytes_of(shape.rows * blocks * kBlockBytes[static_cast<std::size_t>(type)]);
    for (std::byte& byte : values) byte = static_cast<std::byte>(rng_());
    std::vector<std::byte> indices = bytes_of(
        is_sparse24(type) && type != DeltaType::kSparse24Ternary ? shape.rows * blocks * 4 : 0);
    constexpr unsigned kPairs[] = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE};
    for (std::byte& byte : indices) {
      byte = static_cast<std::byte>(kPairs[rng_() % 6] | kPairs[rng_() % 6] << 4);
    }
    std::vector<std::byte> scales = bytes_of(shape.rows * groups * 2);
    for (std::size_t i = 0; i < scales.size(); i += 2) {
      scales[i] = static_cast<std::byte>(rng_());
      scales[i + 1] = std::byte{0x20};  // about 0.01
    }
    const auto group_size = static_cast<std::int32_t>(options_.group_size);
    Buffer host =
        backend_->allocate_host(backend_->tiled_bytes(type, shape.rows, shape.columns, group_size));
    backend_->tile_delta(host.data(),
                         {type, shape.rows, shape.columns, group_size, values, indices, scales});
    if (backend_->shares_host_memory()) return host;
    Buffer device = backend_->allocate(host.num_bytes());
    backend_->copy_to_device(device.data(), host.data(), host.num_bytes(), *stream_);
    stream_->synchronize();
    return device;
  }

  void sbmm() {
    for (const std::string& format : options_.formats) {
      const auto type = delta_type_from_name(format);
      DZ_CHECK(type.has_value(), "--format: unknown format '", format, "'");
      for (const BenchShape& shape : options_.shapes) {
        std::vector<Buffer> pool;
        pool.push_back(random_delta(*type, shape));
        const std::int64_t most = *std::max_element(options_.deltas.begin(), options_.deltas.end());
        const std::int64_t count = std::max(most, num_copies(pool[0].num_bytes()));
        while (static_cast<std::int64_t>(pool.size()) < count) {
          pool.push_back(backend_->allocate(pool[0].num_bytes()));
          backend_->copy_on_device(pool.back().data(), pool[0].data(), pool[0].num_bytes(),
                                   *stream_);
        }
        for (const std::int64_t deltas : options_.deltas) {
          for (const std::int64_t tokens : options_.tokens) {
            const std::int64_t rows = deltas * tokens;
            const Buffer x = random_floats(rows * shape.columns);
            const Buffer y = random_floats(rows * shape.rows);
            std::vector<SbmmTask> tasks(static_cast<std::size_t>(deltas));
            measure("sbmm", format, shape, deltas, tokens,
                    static_cast<double>(pool[0].num_bytes()) * static_cast<double>(deltas),
                    2.0 * static_cast<double>(shape.rows * shape.columns * rows),
                    [&](std::int64_t turn) {
                      for (std::size_t d = 0; d < tasks.size(); ++d) {
                        const std::size_t i =
                            (static_cast<std::size_t>(turn) * tasks.size() + d) % pool.size();
                        tasks[d] = {
                            {pool[i].data(), *type, static_cast<std::int32_t>(options_.group_size),
                             shape.rows, shape.columns},
                            static_cast<std::int32_t>(static_cast<std::int64_t>(d) * tokens),
                            static_cast<std::int32_t>(tokens),
                            0};
                      }
                      backend_->ops().sbmm({y.data(), DType::kFloat32, {rows, shape.rows}},
                                           {x.data(), DType::kFloat32, {rows, shape.columns}},
                                           tasks, *stream_);
                    });
          }
        }
      }
    }
  }

  // Decode of D sequences, and prefill of one, of tokens x 64 keys: 9 heads, 3 KV heads of 64.
  void attention() {
    constexpr std::int32_t kHeads = 9, kKvHeads = 3, kDim = 64, kBlock = 16;
    constexpr std::int64_t kRow = (kHeads + 2 * kKvHeads) * kDim;
    for (const std::int64_t tokens : options_.tokens) {
      const auto length = static_cast<std::int32_t>(64 * tokens);
      for (const std::int64_t deltas : options_.deltas) {
        const std::int32_t blocks_each = length / kBlock;
        const auto num_blocks = static_cast<std::int32_t>(deltas) * blocks_each;
        const std::int64_t floats = std::int64_t{num_blocks} * kKvHeads * kBlock * kDim;
        const Buffer keys = random_floats(floats), values = random_floats(floats);
        std::vector<std::int32_t> blocks(static_cast<std::size_t>(num_blocks));
        for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<std::int32_t>(i);
        std::shuffle(blocks.begin(), blocks.end(), rng_);
        const KvLayer cache{keys.data(), values.data(), num_blocks,     kKvHeads,
                            kBlock,      kDim,          DType::kFloat32};
        for (const bool is_prefill : {false, true}) {
          const std::int32_t rows_each = is_prefill ? length : 1;
          const std::int64_t rows = deltas * rows_each;
          std::vector<AttentionSequence> sequences;
          for (std::int32_t s = 0; s < deltas; ++s) {
            sequences.push_back({s * rows_each, rows_each, length,
                                 blocks.data() + static_cast<std::ptrdiff_t>(s) * blocks_each});
          }
          const Buffer qkv = random_floats(rows * kRow);
          const Buffer out = random_floats(rows * kHeads * kDim);
          const double pairs = is_prefill ? 0.5 * length * (length + 1.0) : length;
          measure(is_prefill ? "prefill" : "decode", "float32", {length, kDim}, deltas, rows_each,
                  8.0 * static_cast<double>(floats),
                  4.0 * pairs * kHeads * kDim * static_cast<double>(deltas), [&](std::int64_t) {
                    backend_->ops().paged_attention(
                        {out.data(), DType::kFloat32, {rows, kHeads * kDim}},
                        {qkv.data(), DType::kFloat32, {rows, kRow}}, cache, sequences, kHeads,
                        0.125F, *stream_);
                  });
        }
      }
    }
  }

  void rowwise(const std::string& op) {
    const std::int64_t size = op == "sample" ? 49152 : op == "silu_mul" ? 1536 : 576;
    for (const std::int64_t rows : options_.tokens) {
      const Buffer x = random_floats(rows * 2 * size), out = random_floats(rows * size);
      const Buffer gain = random_floats(size);
      const std::vector<const float*> gains(static_cast<std::size_t>(rows),
                                            static_cast<const float*>(gain.data()));
      const TensorView result{out.data(), DType::kFloat32, {rows, size}};
      if (op == "sample") {
        for (const bool is_greedy : {true, false}) {
          std::vector<SamplingRow> sampling(static_cast<std::size_t>(rows));
          for (SamplingRow& row : sampling) {
            row.temperature = is_greedy ? 0.0F : 0.8F;
            row.top_p = is_greedy ? 1.0F : 0.95F;
          }
          std::vector<SampledToken> tokens(sampling.size());
          measure(op, is_greedy ? "greedy" : "top_p", {size, 1}, 0, rows,
                  4.0 * static_cast<double>(rows * size), 0.0, [&](std::int64_t turn) {
                    for (SamplingRow& row : sampling)
                      row.position = static_cast<std::uint64_t>(turn);
                    backend_->ops().sample(tokens, {x.data(), DType::kFloat32, {rows, size}},
                                           sampling, *stream_);
                  });
        }
      } else if (op == "silu_mul") {
        measure(op, "float32", {2 * size, size}, 0, rows, 12.0 * static_cast<double>(rows * size),
                0.0, [&](std::int64_t) {
                  backend_->ops().silu_mul(result, {x.data(), DType::kFloat32, {rows, 2 * size}},
                                           *stream_);
                });
      } else {
        const Buffer residual = random_floats(rows * size);
        measure(op, "float32", {size, size}, 0, rows, 16.0 * static_cast<double>(rows * size), 0.0,
                [&](std::int64_t) {
                  backend_->ops().rms_norm(result, {residual.data(), DType::kFloat32, {rows, size}},
                                           {out.data(), DType::kFloat32, {rows, size}}, gains,
                                           1e-5F, *stream_);
                });
      }
    }
  }

  const Options& options_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Stream> stream_;
  std::mt19937_64 rng_{1};
};

}  // namespace
}  // namespace deltazip::bench

int main(int argc, char** argv) {
  try {
    const deltazip::bench::Options options = deltazip::bench::parse_options(argc, argv);
    deltazip::bench::Bench(options).run();
    return 0;
  } catch (const deltazip::Error& error) {
    std::fprintf(stderr, "deltazip-bench-ops: %s\n", error.what());
    return 2;
  }
}
