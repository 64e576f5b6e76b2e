// Products: the base's, the deltas', both in one call, and a dense product for each delta, which is
// what serving whole fine-tunes would do.

#include <algorithm>
#include <string>
#include <vector>

#include "bench.h"
#include "deltazip/base/error.h"

namespace deltazip::bench {
namespace {

struct Weights {
  std::vector<Buffer> buffers;
  DType dtype;
  BenchShape shape;

  PackedMatrix matrix(std::int64_t turn) const {
    const Buffer& buffer = buffers[static_cast<std::size_t>(turn) % buffers.size()];
    return {buffer.data(), dtype, shape.rows, shape.columns};
  }
};

Weights random_weights(Bench& bench, BenchShape shape, std::int64_t count) {
  Weights weights{{}, *dtype_from_name(bench.options().dtype), shape};
  std::vector<std::uint16_t> host(static_cast<std::size_t>(shape.rows * shape.columns) * 2);
  for (std::uint16_t& word : host) {  // around 0.01 as bf16, fp16 or the halves of floats
    word = static_cast<std::uint16_t>(0x3C00u | (bench.rng()() & 0x80FFu));
  }
  const std::size_t bytes = bench.backend().packed_bytes(weights.dtype, shape.rows, shape.columns);
  for (std::int64_t i = 0; i < count; ++i) {
    weights.buffers.push_back(bench.backend().allocate(bytes));
    bench.backend().pack_weight(weights.buffers.back().data(),
                                {host.data(), weights.dtype, {shape.rows, shape.columns}},
                                bench.stream());
  }
  bench.stream().synchronize();
  return weights;
}

// A tiled delta of random codes and small positive scales.
Buffer random_delta(Bench& bench, DeltaType type, const BenchShape& shape) {
  auto& rng = bench.rng();
  const std::int64_t blocks = (shape.columns + 31) / 32;
  const std::int64_t group = bench.options().group_size;
  const std::int64_t groups = (shape.columns + group - 1) / group;
  const auto bytes_of = [](std::int64_t count) {
    return std::vector<std::byte>(static_cast<std::size_t>(count));
  };
  std::vector<std::byte> values = bytes_of(shape.rows * blocks * delta_block_bytes(type));
  for (std::byte& byte : values) byte = static_cast<std::byte>(rng());
  std::vector<std::byte> indices = bytes_of(has_indices(type) ? shape.rows * blocks * 4 : 0);
  constexpr unsigned kPairs[] = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE};
  for (std::byte& byte : indices) {
    byte = static_cast<std::byte>(kPairs[rng() % 6] | kPairs[rng() % 6] << 4);
  }
  std::vector<std::byte> scales = bytes_of(shape.rows * groups * 2);
  for (std::size_t i = 0; i < scales.size(); i += 2) {
    scales[i] = static_cast<std::byte>(rng());
    scales[i + 1] = std::byte{0x20};  // about 0.01
  }
  const auto group_size = static_cast<std::int32_t>(group);
  Backend& backend = bench.backend();
  Buffer host =
      backend.allocate_host(backend.tiled_bytes(type, shape.rows, shape.columns, group_size));
  backend.tile_delta(host.data(),
                     {type, shape.rows, shape.columns, group_size, values, indices, scales});
  return backend.shares_host_memory() ? std::move(host)
                                      : bench.upload(host.data(), host.num_bytes());
}

struct Deltas {
  std::vector<Buffer> buffers;
  DeltaMatrix matrix;  // all but data

  double bytes() const { return static_cast<double>(buffers[0].num_bytes()); }
  // The tasks of turns 0, 1, ...: each takes the next `count` deltas, `tokens` rows for each.
  std::vector<std::vector<SbmmTask>> tasks(std::int64_t count, std::int64_t tokens) const {
    const auto pool = static_cast<std::int64_t>(buffers.size());
    std::vector<std::vector<SbmmTask>> turns;
    for (std::int64_t first = 0; first == 0 || first + count <= pool; first += count) {
      std::vector<SbmmTask>& turn = turns.emplace_back();
      for (std::int64_t d = 0; d < count; ++d) {
        SbmmTask& task = turn.emplace_back();
        task.delta = matrix;
        task.delta.data = buffers[static_cast<std::size_t>((first + d) % pool)].data();
        task.first_row = static_cast<std::int32_t>(d * tokens);
        task.num_rows = static_cast<std::int32_t>(tokens);
      }
    }
    return turns;
  }
};

Deltas random_deltas(Bench& bench, const std::string& format, const BenchShape& shape) {
  const auto type = delta_type_from_name(format);
  DZ_CHECK(type.has_value(), "--format: unknown format '", format, "'");
  Deltas deltas;
  deltas.matrix = {nullptr, bench.backend().tiled_type(*type),
                   static_cast<std::int32_t>(bench.options().group_size), shape.rows,
                   shape.columns};
  deltas.buffers.push_back(random_delta(bench, *type, shape));
  const std::size_t bytes = deltas.buffers[0].num_bytes();
  const std::vector<std::int64_t>& wanted = bench.options().deltas;
  // A multiple of what one call takes would be best; more than one call's worth is what matters.
  const std::int64_t most = *std::max_element(wanted.begin(), wanted.end());
  const std::int64_t count = std::max(most, bench.num_copies(bytes));
  while (static_cast<std::int64_t>(deltas.buffers.size()) < count) {
    deltas.buffers.push_back(bench.backend().allocate(bytes));
    bench.backend().copy_on_device(deltas.buffers.back().data(), deltas.buffers[0].data(), bytes,
                                   bench.stream());
  }
  bench.stream().synchronize();
  return deltas;
}

double flops(const BenchShape& shape, std::int64_t rows) {
  return 2.0 * static_cast<double>(shape.rows * shape.columns * rows);
}

double dense_bytes(Bench& bench, const BenchShape& shape) {
  const DType dtype = *dtype_from_name(bench.options().dtype);
  return static_cast<double>(shape.rows * shape.columns) * static_cast<double>(size_of(dtype));
}

void measure_deltas(Bench& bench, const char* op, bool with_base) {
  for (const std::string& format : bench.options().formats) {
    for (const BenchShape& shape : bench.options().shapes) {
      const Deltas deltas = random_deltas(bench, format, shape);
      const Weights base = random_weights(bench, shape, with_base ? 2 : 0);
      for (const std::int64_t count : bench.options().deltas) {
        for (const std::int64_t tokens : bench.options().tokens) {
          const std::int64_t rows = count * tokens;
          const Buffer x = bench.random(rows * shape.columns, bench.activations());
          const Buffer y = bench.random(rows * shape.rows, bench.activations());
          const TensorView x_view = bench.view(x, rows, shape.columns);
          const TensorView y_view = bench.view(y, rows, shape.rows);
          const auto tasks = deltas.tasks(count, tokens);
          const double moved = deltas.bytes() * static_cast<double>(count) +
                               (with_base ? dense_bytes(bench, shape) : 0.0);
          const Label label{
              op,    format, shape.columns, shape.rows,
              count, tokens, moved,         flops(shape, rows) * (with_base ? 2.0 : 1.0)};
          bench.measure(label, static_cast<std::int64_t>(tasks.size()), [&](std::int64_t turn) {
            const std::vector<SbmmTask>& now = tasks[static_cast<std::size_t>(turn)];
            Ops& ops = bench.backend().ops();
            if (with_base) {
              ops.project(y_view, x_view, base.matrix(turn), now, bench.stream());
            } else {
              ops.sbmm(y_view, x_view, now, bench.stream());
            }
          });
        }
      }
    }
  }
}

}  // namespace

void bench_sbmm(Bench& bench) { measure_deltas(bench, "sbmm", false); }
void bench_project(Bench& bench) { measure_deltas(bench, "project", true); }

void bench_linear(Bench& bench) {
  for (const BenchShape& shape : bench.options().shapes) {
    const std::size_t bytes = bench.backend().packed_bytes(*dtype_from_name(bench.options().dtype),
                                                           shape.rows, shape.columns);
    const Weights weights = random_weights(bench, shape, bench.num_copies(bytes));
    for (const std::int64_t tokens : bench.options().tokens) {
      const Buffer x = bench.random(tokens * shape.columns, bench.activations());
      const Buffer y = bench.random(tokens * shape.rows, bench.activations());
      const TensorView x_view = bench.view(x, tokens, shape.columns);
      const TensorView y_view = bench.view(y, tokens, shape.rows);
      const Label label{"linear", bench.options().dtype,     shape.columns,       shape.rows, 0,
                        tokens,   dense_bytes(bench, shape), flops(shape, tokens)};
      bench.measure(
          label, static_cast<std::int64_t>(weights.buffers.size()), [&](std::int64_t turn) {
            bench.backend().ops().linear(y_view, x_view, weights.matrix(turn), bench.stream());
          });
    }
  }
}

void bench_linear_each(Bench& bench) {
  for (const BenchShape& shape : bench.options().shapes) {
    const std::size_t bytes = bench.backend().packed_bytes(*dtype_from_name(bench.options().dtype),
                                                           shape.rows, shape.columns);
    for (const std::int64_t count : bench.options().deltas) {
      const std::int64_t pool = std::max(count, bench.num_copies(bytes));
      const Weights weights = random_weights(bench, shape, pool);
      for (const std::int64_t tokens : bench.options().tokens) {
        const Buffer x = bench.random(tokens * shape.columns, bench.activations());
        const Buffer y = bench.random(tokens * shape.rows, bench.activations());
        const TensorView x_view = bench.view(x, tokens, shape.columns);
        const TensorView y_view = bench.view(y, tokens, shape.rows);
        const Label label{"linear_each",
                          bench.options().dtype,
                          shape.columns,
                          shape.rows,
                          count,
                          tokens,
                          dense_bytes(bench, shape) * static_cast<double>(count),
                          flops(shape, tokens * count)};
        bench.measure(label, pool / count, [&](std::int64_t turn) {
          for (std::int64_t d = 0; d < count; ++d) {
            bench.backend().ops().linear(y_view, x_view, weights.matrix(turn * count + d),
                                         bench.stream());
          }
        });
      }
    }
  }
}

}  // namespace deltazip::bench
