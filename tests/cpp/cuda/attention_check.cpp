// Paged attention on the device, without the backend: against a double-precision reference, bit
// for bit between runs and batches, and timed. One program, so that one visit to a GPU tells all.
//   attention_check [check|time]      both when nothing is given; exit status 1 on a failure

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backend/cuda/kernels/paged_attention/paged_attention.h"
#include "cuda/attention_common.h"
#include "deltazip/base/dtype.h"

namespace deltazip::cuda {
namespace {

constexpr std::uint16_t kNan16 = 0x7FFF;  // in float16 and in bfloat16
constexpr std::int64_t kGuardRows = 3;

struct Case {
  std::string title;
  DType dtype;
  Heads heads;
  std::vector<Length> lengths;
};

float widen(DType dtype, std::uint16_t bits) {
  return dtype == DType::kFloat16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
}

std::uint16_t narrow(DType dtype, float value) {
  return dtype == DType::kFloat16 ? to_half(value).bits : to_bfloat16(value).bits;
}

// A batch with a shuffled cache; whatever must not be read is NaN.
struct Batch {
  Batch(const Case& which, Rng& rng) : heads(which.heads), dtype(which.dtype) {
    std::int32_t num_blocks = 2;
    for (const Length& length : which.lengths) num_blocks += blocks_for(length);
    std::vector<std::int32_t> order(to_size(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    keys.assign(
        to_size(std::int64_t{num_blocks} * heads.num_kv_heads * heads.block_size * heads.head_dim),
        kNan16);
    values = keys;
    std::normal_distribution<float> normal;
    std::size_t next = 0;
    tables.resize(which.lengths.size());
    for (std::size_t s = 0; s < which.lengths.size(); ++s) {
      const Length& length = which.lengths[s];
      for (std::int32_t b = 0; b < blocks_for(length); ++b) tables[s].push_back(order[next++]);
      sequences.push_back({static_cast<std::int32_t>(num_rows), length.num_rows,
                           length.context_length, tables[s].data()});
      num_rows += length.num_rows;
      if (length.num_rows == 0) continue;  // padding: a length, perhaps, but no blocks
      for (std::int32_t p = 0; p < length.context_length; ++p) {
        for (std::int32_t h = 0; h < heads.num_kv_heads; ++h) {
          for (std::int32_t d = 0; d < heads.head_dim; ++d) {
            keys[place(s, p, h) + to_size(d)] = narrow(dtype, normal(rng));
            values[place(s, p, h) + to_size(d)] = narrow(dtype, normal(rng));
          }
        }
      }
    }
    const std::int64_t columns =
        std::int64_t{heads.num_heads + 2 * heads.num_kv_heads} * heads.head_dim;
    qkv.assign(to_size(num_rows * columns), kNan16);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      for (std::int64_t c = 0; c < std::int64_t{heads.num_heads} * heads.head_dim; ++c) {
        // Every other head's scores spread wide, so that its maximum goes on growing.
        const float spread = (row + c / heads.head_dim) % 2 == 0 ? 1.0F : 8.0F;
        qkv[to_size(row * columns + c)] = narrow(dtype, spread * normal(rng));
      }
    }
  }

  std::int32_t blocks_for(const Length& length) const {
    if (length.num_rows == 0) return 0;
    return (length.context_length + heads.block_size - 1) / heads.block_size;
  }
  std::size_t place(std::size_t s, std::int32_t p, std::int32_t h) const {
    const std::int64_t block = tables[s][to_size(p / heads.block_size)];
    return to_size(((block * heads.num_kv_heads + h) * heads.block_size + p % heads.block_size) *
                   heads.head_dim);
  }
  std::int64_t out_columns() const { return std::int64_t{heads.num_heads} * heads.head_dim; }
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(heads.head_dim)); }
  AttentionShape shape() const {
    return {heads.num_heads,  heads.num_kv_heads, heads.head_dim,
            heads.block_size, num_rows,           static_cast<std::int32_t>(sequences.size())};
  }

  // [num_rows, num_heads * head_dim]
  std::vector<double> reference() const {
    std::vector<double> out(to_size(num_rows * out_columns()));
    std::vector<std::thread> workers;
    const std::size_t num_workers = std::max(1u, std::thread::hardware_concurrency());
    for (std::size_t worker = 0; worker < num_workers; ++worker) {
      workers.emplace_back([&, worker] {
        for (std::size_t s = 0; s < sequences.size(); ++s) {
          for (std::int32_t i = 0; i < sequences[s].num_rows; ++i) {
            const std::int64_t row = sequences[s].first_row + i;
            if (to_size(row) % num_workers != worker) continue;
            for (std::int32_t h = 0; h < heads.num_heads; ++h) attend(s, i, h, out);
          }
        }
      });
    }
    for (std::thread& each : workers) each.join();
    return out;
  }

  void attend(std::size_t s, std::int32_t i, std::int32_t head, std::vector<double>& out) const {
    const AttentionSequence& sequence = sequences[s];
    const std::int32_t num_keys = sequence.context_length - sequence.num_rows + i + 1;
    const std::int32_t kv_head = head / (heads.num_heads / heads.num_kv_heads);
    const std::int64_t row = sequence.first_row + i, columns = out_columns();
    const std::int64_t qkv_columns = columns + 2LL * heads.num_kv_heads * heads.head_dim;
    const std::uint16_t* q = &qkv[to_size(row * qkv_columns + head * heads.head_dim)];
    std::vector<double> query(to_size(heads.head_dim)), weights(to_size(num_keys));
    for (std::size_t d = 0; d < query.size(); ++d) query[d] = widen(dtype, q[d]);
    double most = -INFINITY;
    for (std::int32_t p = 0; p < num_keys; ++p) {
      const std::uint16_t* key = &keys[place(s, p, kv_head)];
      double dot = 0;
      for (std::size_t d = 0; d < query.size(); ++d) dot += query[d] * widen(dtype, key[d]);
      weights[to_size(p)] = dot * scale();
      most = std::max(most, weights[to_size(p)]);
    }
    double total = 0;
    double* to = &out[to_size(row * columns + head * heads.head_dim)];
    for (std::int32_t p = 0; p < num_keys; ++p) {
      const double weight = std::exp(weights[to_size(p)] - most);
      const std::uint16_t* value = &values[place(s, p, kv_head)];
      total += weight;
      for (std::size_t d = 0; d < query.size(); ++d) to[d] += weight * widen(dtype, value[d]);
    }
    for (std::size_t d = 0; d < query.size(); ++d) to[d] /= total;
  }

  Heads heads;
  DType dtype;
  std::int64_t num_rows = 0;
  std::vector<std::uint16_t> keys, values, qkv;
  std::vector<std::vector<std::int32_t>> tables;
  std::vector<AttentionSequence> sequences;
};

// Runs a batch, or some of its sequences, on the device.
class Runner {
 public:
  explicit Runner(const Batch& batch)
      : batch_(batch),
        qkv_(batch.qkv),
        keys_(batch.keys),
        values_(batch.values),
        out_(to_size((batch.num_rows + 2 * kGuardRows) * batch.out_columns())),
        scratch_(static_cast<std::int64_t>(batch.sequences.size()), batch.heads) {
    prepare_paged_attention(batch.dtype, batch.heads.head_dim);
    DZ_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~Runner() { cudaStreamDestroy(stream_); }

  // Rows and guards before and after, as they stand when the kernels have run.
  std::vector<std::uint16_t> run(std::span<const AttentionSequence> sequences,
                                 const AttentionShape& shape) {
    AttentionPlan plan;
    plan.build(sequences, shape);
    const DeviceArray<std::int32_t> words(
        std::vector<std::int32_t>(plan.words().begin(), plan.words().end()));
    poison();
    launch_all(words.data(), may_prefill(shape));
    DZ_CUDA(cudaStreamSynchronize(stream_));
    return out_.read();
  }

  // Records a launch with one plan, replays it with another of the same shape.
  std::vector<std::uint16_t> run_replayed(std::span<const AttentionSequence> recorded,
                                          std::span<const AttentionSequence> replayed,
                                          const AttentionShape& shape) {
    AttentionPlan first, second;
    first.build(recorded, shape);
    second.build(replayed, shape);
    DeviceArray<std::int32_t> words(std::max(first.words().size(), second.words().size()));
    words.write({first.words().begin(), first.words().end()});
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    DZ_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    launch_all(words.data(), may_prefill(shape));
    DZ_CUDA(cudaStreamEndCapture(stream_, &graph));
    DZ_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    DZ_CUDA(cudaGraphLaunch(exec, stream_));
    DZ_CUDA(cudaStreamSynchronize(stream_));
    words.write({second.words().begin(), second.words().end()});
    poison();
    DZ_CUDA(cudaGraphLaunch(exec, stream_));
    DZ_CUDA(cudaStreamSynchronize(stream_));
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    return out_.read();
  }

  bool counters_are_zero() const {
    const auto counters = scratch_.counters.read();
    return std::all_of(counters.begin(), counters.end(), [](auto c) { return c == 0; });
  }

 private:
  void poison() {
    out_.fill_bytes(0xFF);
    scratch_.sums.fill_bytes(0xFF);
    scratch_.softmax.fill_bytes(0xFF);
    DZ_CUDA(cudaDeviceSynchronize());
  }
  void launch_all(const std::int32_t* plan, bool has_prefill) {
    launch_paged_attention(
        {qkv_.data(), out_.data() + kGuardRows * batch_.out_columns(), keys_.data(), values_.data(),
         plan, scratch_.sums.data(), scratch_.softmax.data(), scratch_.counters.data(),
         batch_.heads.num_heads, batch_.heads.num_kv_heads, batch_.heads.block_size,
         batch_.scale()},
        {batch_.dtype, batch_.heads.head_dim, device_sms(), has_prefill}, stream_);
    DZ_CUDA(cudaGetLastError());
  }

  const Batch& batch_;
  DeviceArray<std::uint16_t> qkv_, keys_, values_, out_;
  Scratch scratch_;
  cudaStream_t stream_ = nullptr;
};

struct Errors {
  double relative = 0, largest = 0;
};

Errors compare(const Batch& batch, const std::vector<std::uint16_t>& out,
               const std::vector<double>& expected) {
  const std::size_t guard = to_size(kGuardRows * batch.out_columns());
  double difference = 0, norm = 0, most = 0, scale = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = widen(batch.dtype, out[guard + i]) - expected[i];
    if (!std::isfinite(error)) return {INFINITY, INFINITY};
    difference += error * error;
    norm += expected[i] * expected[i];
    most = std::max(most, std::abs(error));
    scale = std::max(scale, std::abs(expected[i]));
  }
  return {std::sqrt(difference / norm), most / scale};
}

bool rows_equal(const Batch& batch, const std::vector<std::uint16_t>& a,
                const std::vector<std::uint16_t>& b, const AttentionSequence& sequence) {
  const std::size_t columns = to_size(batch.out_columns());
  const std::size_t first = to_size(sequence.first_row + kGuardRows) * columns;
  return std::memcmp(&a[first], &b[first], to_size(sequence.num_rows) * columns * 2) == 0;
}

// Empty when all is well, else what is wrong.
std::string check_case(const Case& which, Rng& rng, Errors& errors) {
  const Batch batch(which, rng);
  Runner runner(batch);
  const auto out = runner.run(batch.sequences, batch.shape());
  errors = compare(batch, out, batch.reference());
  const double bound = which.dtype == DType::kFloat16 ? 1e-3 : 8e-3;
  std::string wrong;
  if (!(errors.relative < bound)) wrong += " relative-error";
  if (!(errors.largest < 3 * bound)) wrong += " largest-error";
  const std::size_t guard = to_size(kGuardRows * batch.out_columns());
  const auto poisoned = [](std::uint16_t v) { return v == 0xFFFF; };
  if (!std::all_of(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(guard), poisoned) ||
      !std::all_of(out.end() - static_cast<std::ptrdiff_t>(guard), out.end(), poisoned)) {
    wrong += " wrote-outside";
  }
  if (!runner.counters_are_zero()) wrong += " counters";
  for (int repeat = 0; repeat < 3; ++repeat) {
    if (runner.run(batch.sequences, batch.shape()) != out) wrong += " not-repeatable";
  }
  // Alone, at least while the shape allows the same kernel; all others become padding.
  for (std::size_t s = 0; s < std::min<std::size_t>(batch.sequences.size(), 4); ++s) {
    std::vector<AttentionSequence> alone(batch.sequences.size());
    alone[s] = batch.sequences[s];
    if (alone[s].num_rows == 0) continue;
    if (!rows_equal(batch, runner.run(alone, batch.shape()), out, alone[s])) {
      wrong += " depends-on-batch";
    }
    if (alone[s].num_rows != 1) continue;
    AttentionShape shape = batch.shape();
    shape.num_rows = shape.num_sequences = 1;
    if (!rows_equal(batch, runner.run(std::span(&alone[s], 1), shape), out, alone[s])) {
      wrong += " depends-on-batch-size";
    }
  }
  std::vector<AttentionSequence> shortened = batch.sequences;
  for (AttentionSequence& sequence : shortened) {
    sequence.context_length = std::max(sequence.num_rows, sequence.context_length / 3);
  }
  if (runner.run_replayed(shortened, batch.sequences, batch.shape()) != out) wrong += " replay";
  if (runner.run_replayed(batch.sequences, shortened, batch.shape()) !=
      runner.run(shortened, batch.shape())) {
    wrong += " replay-shorter";
  }
  if (!runner.counters_are_zero()) wrong += " counters-after";
  return wrong;
}

std::vector<Case> all_cases() {
  const DType half = DType::kFloat16, bfloat = DType::kBFloat16;
  const std::vector<Length> decode{{1, 1},   {1, 2},   {1, 15},  {1, 16},  {1, 17},  {1, 63},
                                   {1, 64},  {1, 65},  {1, 200}, {1, 255}, {1, 256}, {1, 257},
                                   {1, 511}, {1, 513}, {1, 999}, {0, 0},   {1, 2000}};
  const std::vector<Length> prompts{{1, 1}, {17, 17}, {129, 129}, {64, 64}, {200, 333}, {300, 300}};
  const std::vector<Length> mixed{{1, 777}, {100, 1500}, {0, 0}, {1, 33},   {257, 257},
                                  {5, 605}, {1, 2000},   {2, 2}, {33, 801}, {1, 1}};
  std::vector<Case> cases;
  for (const DType dtype : {half, bfloat}) {
    for (const std::int32_t head_dim : {64, 96, 128, 256}) {
      for (const auto& [heads, kv_heads] :
           {std::pair{4, 4}, std::pair{6, 2}, std::pair{8, 2}, std::pair{8, 1}}) {
        const std::string title = std::string(name(dtype)) + " d" + std::to_string(head_dim) + " " +
                                  std::to_string(heads) + "/" + std::to_string(kv_heads);
        cases.push_back({title + " decode", dtype, {heads, kv_heads, head_dim, 16}, decode});
        cases.push_back({title + " mixed", dtype, {heads, kv_heads, head_dim, 16}, mixed});
      }
      const std::string title = std::string(name(dtype)) + " d" + std::to_string(head_dim);
      cases.push_back({title + " prompts", dtype, {4, 2, head_dim, 16}, prompts});
    }
  }
  for (const std::int32_t block_size : {8, 24, 32, 256, 1024}) {
    const std::string title = "blocks of " + std::to_string(block_size);
    cases.push_back({title + " decode", half, {4, 2, 128, block_size}, decode});
    cases.push_back({title + " mixed", half, {4, 2, 128, block_size}, mixed});
  }
  cases.push_back({"group of 24", half, {24, 1, 64, 16}, mixed});
  cases.push_back({"group of 71", half, {71, 1, 64, 16}, {{1, 700}, {1, 3}, {2, 90}}});
  cases.push_back({"long", half, {4, 1, 128, 16}, {{1, 20001}, {2, 9000}, {9, 9000}, {16, 8200}}});
  std::vector<Length> many;
  for (std::int32_t i = 0; i < 150; ++i) many.push_back({i % 7 == 3 ? 0 : 1, 1 + i * 37 % 900});
  cases.push_back({"many", bfloat, {32, 8, 128, 16}, many});
  return cases;
}

int check_all() {
  Rng rng(20250123);
  int num_failed = 0, num_cases = 0;
  Errors worst[2];
  for (const Case& which : all_cases()) {
    std::printf("%s\n", which.title.c_str());  // before it runs: a crash then has a name
    Errors errors;
    const std::string wrong = check_case(which, rng, errors);
    Errors& most = worst[which.dtype == DType::kFloat16 ? 0 : 1];
    most.relative = std::max(most.relative, errors.relative);
    most.largest = std::max(most.largest, errors.largest);
    ++num_cases;
    if (wrong.empty()) continue;
    ++num_failed;
    std::printf("FAILED %-28s relative %.2e largest %.2e:%s\n", which.title.c_str(),
                errors.relative, errors.largest, wrong.c_str());
  }
  std::printf(
      "check: %d of %d cases passed; worst relative / largest error: float16 %.1e / %.1e, "
      "bfloat16 %.1e / %.1e\n",
      num_cases - num_failed, num_cases, worst[0].relative, worst[0].largest, worst[1].relative,
      worst[1].largest);
  return num_failed;
}

}  // namespace
}  // namespace deltazip::cuda

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a file too gets each line at once
  const std::string what = argc > 1 ? argv[1] : "";
  try {
    int num_failed = 0;
    if (what != "time") num_failed = deltazip::cuda::check_all();
    if (what != "check") deltazip::cuda::time_attention();
    return num_failed == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
