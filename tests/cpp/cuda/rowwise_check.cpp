#include <algorithm>
#include <cmath>

#include "backend/cuda/kernels/rowwise/rowwise.h"
#include "cuda/rows_check.h"

namespace deltazip::cuda::check {
namespace {

constexpr DType kDTypes[] = {DType::kFloat16, DType::kBFloat16};
constexpr std::int64_t kSizes[] = {576, 4096, 11008, 100, 7, 1536, 20480, 1};

using Words = std::vector<std::uint16_t>;

// Whether every word is `expected`, rounded, or a neighbour where the sum's order may decide.
bool agree(DType dtype, const Words& words, const std::vector<double>& expected) {
  const double step = dtype == DType::kFloat16 ? 0x1p-10 : 0x1p-7;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const double error = std::abs(static_cast<double>(widen(dtype, words[i])) - expected[i]);
    if (!(error <= 0.51 * step * std::abs(expected[i]) + 1e-7)) return false;
  }
  return words.size() == expected.size();
}

std::string label(const char* what, DType dtype, std::int64_t size) {
  return std::string(what) + " " + std::string(name(dtype)) + " " + std::to_string(size);
}

template <typename T>
std::vector<T*> pointers(const Memory& memory, std::int64_t size, std::vector<int> rows) {
  std::vector<T*> result;
  for (const int row : rows) {
    result.push_back(row < 0 ? nullptr : memory.get<T>() + row * size);
  }
  return result;
}

// At a pitch that keeps rows 16-byte aligned.
std::int64_t pitch(std::int64_t size) { return (size + 3) / 4 * 4; }

void check_rms_norm(Report& report, DType dtype, std::int64_t size, bool has_x, Rng& rng,
                    cudaStream_t stream) {
  const std::int64_t rows = 5;
  const auto count = static_cast<std::size_t>(rows * size);
  const Words x = random_words(count, dtype, 1.0F, rng);
  const Words before = random_words(count, dtype, 3.0F, rng);
  const std::vector<float> gains = random_floats(static_cast<std::size_t>(2 * pitch(size)), 1, rng);
  const Memory gain_memory(gains), x_memory(x), residual(before), out(count * 2);
  const std::vector<int> order{0, 1, 1, 0, 1};
  const Memory row_gains(pointers<const float>(gain_memory, pitch(size), order));
  launch_rms_norm({has_x ? x_memory.get() : nullptr, residual.get(), out.get(),
                   row_gains.get<const float*>(), 1e-5F, rows, size, dtype},
                  stream);
  DZ_CUDA(cudaStreamSynchronize(stream));
  std::vector<double> expected;
  Words sums;
  for (std::int64_t row = 0; row < rows; ++row) {
    double squares = 0.0;
    for (std::int64_t i = 0; i < size; ++i) {
      const auto at = static_cast<std::size_t>(row * size + i);
      const float sum = widen(dtype, before[at]) + (has_x ? widen(dtype, x[at]) : 0.0F);
      sums.push_back(round_to(dtype, sum));
      const double value = widen(dtype, sums.back());
      squares += value * value;
    }
    const double factor = 1.0 / std::sqrt(squares / static_cast<double>(size) + 1e-5);
    for (std::int64_t i = 0; i < size; ++i) {
      const float gain =
          gains[static_cast<std::size_t>(order[static_cast<std::size_t>(row)] * pitch(size) + i)];
      expected.push_back(
          static_cast<double>(widen(dtype, sums[static_cast<std::size_t>(row * size + i)])) *
          factor * static_cast<double>(gain));
    }
  }
  const std::string what = label(has_x ? "rms_norm + x" : "rms_norm", dtype, size);
  report.expect(agree(dtype, out.read<std::uint16_t>(), expected), what);
  report.expect(residual.read<std::uint16_t>() == sums, what + ": residual");
  report.expect(out.guards_intact() && residual.guards_intact(), what + ": guards");
}

void check_bias_add(Report& report, DType dtype, std::int64_t size, Rng& rng, cudaStream_t stream) {
  const auto count = static_cast<std::size_t>(3 * size);
  const Words before = random_words(count, dtype, 1.0F, rng);
  const std::vector<float> bias = random_floats(static_cast<std::size_t>(2 * pitch(size)), 1, rng);
  const Memory y(before), bias_memory(bias);
  const std::vector<int> order{1, -1, 0};
  const Memory row_biases(pointers<const float>(bias_memory, pitch(size), order));
  launch_bias_add({y.get(), row_biases.get<const float*>(), 3, size, dtype}, stream);
  DZ_CUDA(cudaStreamSynchronize(stream));
  Words expected = before;
  for (const std::int64_t row : {0, 2}) {
    for (std::int64_t i = 0; i < size; ++i) {
      std::uint16_t& word = expected[static_cast<std::size_t>(row * size + i)];
      const std::int64_t from = row == 0 ? pitch(size) : 0;
      word = round_to(dtype, widen(dtype, word) + bias[static_cast<std::size_t>(from + i)]);
    }
  }
  report.expect(y.read<std::uint16_t>() == expected, label("bias_add", dtype, size));
  report.expect(y.guards_intact(), label("bias_add guards", dtype, size));
}

void check_silu_mul(Report& report, DType dtype, std::int64_t size, Rng& rng, cudaStream_t stream) {
  const std::int64_t rows = 3;
  const Words gate_up = random_words(static_cast<std::size_t>(rows * 2 * size), dtype, 4.0F, rng);
  const Memory from(gate_up), out(static_cast<std::size_t>(rows * size) * 2);
  launch_silu_mul({from.get(), out.get(), rows, size, dtype}, stream);
  DZ_CUDA(cudaStreamSynchronize(stream));
  std::vector<double> expected;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < size; ++i) {
      const auto at = static_cast<std::size_t>(row * 2 * size + i);
      const double gate = widen(dtype, gate_up[at]);
      const double up = widen(dtype, gate_up[at + static_cast<std::size_t>(size)]);
      expected.push_back(gate / (1.0 + std::exp(-gate)) * up);
    }
  }
  report.expect(agree(dtype, out.read<std::uint16_t>(), expected), label("silu_mul", dtype, size));
  report.expect(out.guards_intact(), label("silu_mul guards", dtype, size));
}

void check_gather_and_embed(Report& report, DType dtype, std::int64_t size, Rng& rng,
                            cudaStream_t stream) {
  const Words x = random_words(static_cast<std::size_t>(9 * size), dtype, 1.0F, rng);
  const std::vector<std::int32_t> rows{8, 0, 8, 5}, tokens{8, ~0, ~1, 5}, sampled{0, 8};
  Words expected;
  for (const std::int32_t row : rows) {
    const auto from = x.begin() + row * size;
    expected.insert(expected.end(), from, from + size);
  }
  const Memory table(x), rows_memory(rows), tokens_memory(tokens), sampled_memory(sampled);
  const Memory gathered(expected.size() * 2), embedded(expected.size() * 2);
  launch_gather_rows({table.get(), gathered.get(), rows_memory.get<std::int32_t>(), 4, 2 * size},
                     stream);
  launch_embed({tokens_memory.get<std::int32_t>(), sampled_memory.get<std::int32_t>(), table.get(),
                nullptr, embedded.get(), 4, size, dtype},
               stream);
  DZ_CUDA(cudaStreamSynchronize(stream));
  report.expect(gathered.read<std::uint16_t>() == expected && gathered.guards_intact(),
                label("gather_rows", dtype, size));
  report.expect(embedded.read<std::uint16_t>() == expected && embedded.guards_intact(),
                label("embed", dtype, size));
}

void check_rope_append(Report& report, DType dtype, std::int32_t dim, Rng& rng,
                       cudaStream_t stream) {
  const std::int32_t heads = 6, kv_heads = 2, block_size = 4, blocks = 5, rows = 4;
  const std::int64_t row_size = (heads + 2 * kv_heads) * dim;
  const Words before = random_words(static_cast<std::size_t>(rows * row_size), dtype, 1.0F, rng);
  const std::vector<float> angles = random_floats(static_cast<std::size_t>(4 * dim), 1.0F, rng);
  const std::vector<std::int32_t> angle_rows{3, 0, 2, 1};
  const std::vector<std::int64_t> slots{7, 19, 0, -1};
  const auto cache_size = static_cast<std::size_t>(blocks * kv_heads * block_size * dim);
  const Memory qkv(before), angle_memory(angles), angle_row_memory(angle_rows), slot_memory(slots);
  const Memory keys(cache_size * 2), values(cache_size * 2);
  launch_rope_append({qkv.get(), angle_memory.get<float>(), angle_row_memory.get<std::int32_t>(),
                      slot_memory.get<std::int64_t>(), keys.get(), values.get(), rows, heads,
                      kv_heads, block_size, dim, dtype},
                     stream);
  DZ_CUDA(cudaStreamSynchronize(stream));
  Words expected = before, expected_keys(cache_size, 0xFFFF), expected_values(cache_size, 0xFFFF);
  for (std::int32_t row = 0; row < rows; ++row) {
    const float* cosines = angles.data() + angle_rows[static_cast<std::size_t>(row)] * dim;
    const std::int64_t slot = slots[static_cast<std::size_t>(row)];
    for (std::int32_t head = 0; head < heads + 2 * kv_heads; ++head) {
      const std::uint16_t* from = before.data() + row * row_size + head * dim;
      const std::int32_t kv_head = (head - heads) % kv_heads;
      const std::int64_t place =
          ((slot / block_size * kv_heads + kv_head) * block_size + slot % block_size) * dim;
      for (std::int32_t i = 0; i < dim; ++i) {
        const std::int32_t j = i % (dim / 2);
        const float low = widen(dtype, from[j]), high = widen(dtype, from[dim / 2 + j]);
        const float c = cosines[j], s = cosines[dim / 2 + j];
        // The device fuses a product and a sum; in double neither rounding shows.
        const double turned = i < dim / 2
                                  ? static_cast<double>(low) * c - static_cast<double>(high) * s
                                  : static_cast<double>(high) * c + static_cast<double>(low) * s;
        const std::uint16_t word = round_to(dtype, static_cast<float>(turned));
        const auto at = static_cast<std::size_t>(place + i);
        if (head < heads) {
          expected[static_cast<std::size_t>(row * row_size + head * dim + i)] = word;
        } else if (slot >= 0 && head < heads + kv_heads) {
          expected_keys[at] = word;
        } else if (slot >= 0) {
          expected_values[at] = from[i];
        }
      }
    }
  }
  // Untouched words are NaN to the bit; a float rounding before the last may move the others.
  const auto close = [&](const Words& a, const Words& b) {
    const float step = dtype == DType::kFloat16 ? 0x1p-10F : 0x1p-7F;
    std::size_t num_off = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (a[i] == b[i]) continue;
      ++num_off;
      const float expected = widen(dtype, b[i]);
      const float error = std::abs(widen(dtype, a[i]) - expected);
      if (!(error <= 1.01F * step * std::abs(expected) + 3e-7F)) return false;
    }
    return num_off <= 1 + a.size() / 100;
  };
  const std::string what = label("rope_append", dtype, dim);
  report.expect(close(qkv.read<std::uint16_t>(), expected), what + ": q");
  report.expect(close(keys.read<std::uint16_t>(), expected_keys), what + ": keys");
  report.expect(values.read<std::uint16_t>() == expected_values, what + ": values");
  report.expect(qkv.guards_intact() && keys.guards_intact() && values.guards_intact(),
                what + ": guards");
}

}  // namespace

void check_rowwise(Report& report, cudaStream_t stream) {
  Rng rng(20250123);
  for (const DType dtype : kDTypes) {
    for (const std::int64_t size : kSizes) {
      check_rms_norm(report, dtype, size, true, rng, stream);
      check_rms_norm(report, dtype, size, false, rng, stream);
      check_bias_add(report, dtype, size, rng, stream);
      check_silu_mul(report, dtype, size, rng, stream);
      check_gather_and_embed(report, dtype, size, rng, stream);
    }
    for (const std::int32_t dim : {128, 64, 96, 256, 10, 2}) {
      check_rope_append(report, dtype, dim, rng, stream);
    }
  }
}

void time_rowwise(cudaStream_t stream) {
  struct Shape {
    const char* model;
    std::int64_t hidden, inner;
    std::int32_t heads, kv_heads, dim;
  };
  const DType dtype = DType::kBFloat16;
  Rng rng(1);
  std::printf(
      "\nus a launch, 200 in a graph   embed rms_norm rope_append silu_mul bias_add gather\n");
  for (const Shape& s :
       {Shape{"7B", 4096, 11008, 32, 32, 128}, Shape{"135M", 576, 1536, 9, 3, 64}}) {
    for (const std::int64_t rows : {1, 32, 128, 2048}) {
      const std::int64_t row_size = (s.heads + 2 * s.kv_heads) * s.dim;
      const auto at = [](std::int64_t n) { return static_cast<std::size_t>(n); };
      const Memory x(random_words(at(rows * s.hidden), dtype, 1.0F, rng));
      const Memory residual(random_words(at(rows * s.hidden), dtype, 1.0F, rng)),
          out(at(rows * s.inner * 2));
      const Memory qkv(random_words(at(rows * row_size), dtype, 1.0F, rng));
      const Memory gate_up(random_words(at(rows * 2 * s.inner), dtype, 1.0F, rng));
      const Memory table(random_words(at(1000 * s.hidden), dtype, 1.0F, rng));
      const Memory gain(random_floats(at(std::max(row_size, s.hidden)), 1.0F, rng));
      const Memory angles(random_floats(at(4096 * s.dim), 1.0F, rng));
      std::vector<std::int32_t> indices(at(rows)), row_indices(at(rows));
      std::vector<std::int64_t> slots(at(rows));
      for (std::int64_t i = 0; i < rows; ++i) {
        indices[at(i)] = static_cast<std::int32_t>(rng() % 1000);
        row_indices[at(i)] = static_cast<std::int32_t>(i);
        slots[at(i)] = i * 16;
      }
      const Memory cache(at(2 * rows * 16 * s.kv_heads * s.dim * 2));
      const Memory index_memory(indices), row_memory(row_indices), slot_memory(slots);
      const Memory gains(std::vector<const float*>(at(rows), gain.get<float>()));
      const auto* gain_rows = gains.get<const float*>();
      const auto time = [&](auto body) { return time_in_graph(stream, body); };
      std::printf(
          "%-5s batch %4d %19.2f %8.2f %11.2f %8.2f %8.2f %6.2f\n", s.model, static_cast<int>(rows),
          time([&] {
            launch_embed({index_memory.get<std::int32_t>(), nullptr, table.get(), nullptr,
                          out.get(), rows, s.hidden, dtype},
                         stream);
          }),
          time([&] {
            launch_rms_norm(
                {x.get(), residual.get(), out.get(), gain_rows, 1e-5F, rows, s.hidden, dtype},
                stream);
          }),
          time([&] {
            launch_rope_append({qkv.get(), angles.get<float>(), index_memory.get<std::int32_t>(),
                                slot_memory.get<std::int64_t>(), cache.get(),
                                cache.get<std::uint16_t>() + rows * 16 * s.kv_heads * s.dim, rows,
                                s.heads, s.kv_heads, 16, s.dim, dtype},
                               stream);
          }),
          time([&] { launch_silu_mul({gate_up.get(), out.get(), rows, s.inner, dtype}, stream); }),
          time([&] { launch_bias_add({qkv.get(), gain_rows, rows, row_size, dtype}, stream); }),
          time([&] {
            launch_gather_rows(
                {x.get(), out.get(), row_memory.get<std::int32_t>(), rows, 2 * s.hidden}, stream);
          }));
    }
  }
}

}  // namespace deltazip::cuda::check
