#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>

#include "backend/cuda/kernels/sample/sample.h"
#include "cuda/rows_check.h"
#include "deltazip/backend/backend.h"

namespace deltazip::cuda::check {
namespace {

// Without clusters, fewer CTAs than rows: some take several.
constexpr int kScratchCtas = 5;

std::size_t at(std::int64_t n) { return static_cast<std::size_t>(n); }

// Rows with their lists on the host, and the same on the device.
struct Rows {
  std::vector<SamplingRow> rows;
  std::vector<std::vector<std::int32_t>> tokens;
  std::vector<std::vector<TokenBias>> biases;

  std::vector<SamplingRow> on_device(std::vector<Memory>& memory) const {
    std::vector<SamplingRow> result = rows;
    const auto move = [&]<typename T>(const T*& pointer, std::int32_t count) {
      if (count == 0) return;
      memory.emplace_back(std::vector<T>(pointer, pointer + count));
      pointer = memory.back().get<T>();
    };
    for (SamplingRow& row : result) {
      move(row.prompt_tokens, row.num_prompt_tokens);
      move(row.output_tokens, row.num_output_tokens);
      move(row.biases, row.num_biases);
      move(row.banned_tokens, row.num_banned_tokens);
    }
    return result;
  }
};

Rows random_rows(std::int64_t count, std::int64_t vocab, Rng& rng) {
  Rows result;
  const auto chance = [&](unsigned one_in) { return rng() % one_in == 0; };
  const auto unit = [&] { return std::uniform_real_distribution<float>(0.0F, 1.0F)(rng); };
  const auto random_tokens = [&](std::int64_t number) -> std::vector<std::int32_t>& {
    std::vector<std::int32_t>& list = result.tokens.emplace_back();
    const auto range =
        static_cast<std::uint64_t>(chance(2) ? vocab : std::min<std::int64_t>(vocab, 50));
    for (std::int64_t i = 0; i < number; ++i)
      list.push_back(static_cast<std::int32_t>(rng() % range));
    return list;
  };
  for (std::int64_t i = 0; i < count; ++i) {
    SamplingRow row;
    row.temperature = chance(4) ? 0.0F : 0.2F + 1.5F * unit();
    if (chance(3))
      row.top_k = 1 + static_cast<std::int32_t>(rng() % at(std::min<std::int64_t>(vocab + 3, 500)));
    if (chance(2)) row.top_p = 0.05F + 0.95F * unit();
    if (chance(5)) row.min_p = 0.3F * unit();
    row.seed = rng();
    row.position = rng() % 5000;
    if (chance(4)) row.repetition_penalty = 0.7F + unit();
    if (chance(5)) row.presence_penalty = 2.0F * unit() - 1.0F;
    if (chance(5)) row.frequency_penalty = 2.0F * unit() - 1.0F;
    const auto& prompt = random_tokens(static_cast<std::int64_t>(rng() % 3000));
    row.prompt_tokens = prompt.data();
    row.num_prompt_tokens = static_cast<std::int32_t>(prompt.size());
    const auto& output = random_tokens(static_cast<std::int64_t>(rng() % 3000));
    row.output_tokens = output.data();
    row.num_output_tokens = static_cast<std::int32_t>(output.size());
    if (chance(5)) {
      std::vector<TokenBias>& biases = result.biases.emplace_back();
      for (const std::int32_t token : random_tokens(40))
        biases.push_back({token, 6.0F * unit() - 3.0F});
      std::ranges::stable_sort(biases, {}, &TokenBias::token);
      row.biases = biases.data();
      row.num_biases = 40;
    }
    if (vocab > 1 && chance(5)) {
      const auto& banned = random_tokens(std::min<std::int64_t>(20, vocab - 1));
      row.banned_tokens = banned.data();
      row.num_banned_tokens = static_cast<std::int32_t>(banned.size());
    }
    row.num_logprobs = static_cast<std::int32_t>(rng() % 22) - 1;
    if (chance(6)) row.forced_token = static_cast<std::int32_t>(rng() % at(vocab));
    result.rows.push_back(row);
  }
  return result;
}

std::vector<SampledToken> sample_on_device(const Memory& logits, DType dtype,
                                           const std::vector<SamplingRow>& rows, std::int64_t vocab,
                                           std::vector<std::int32_t>& tokens, cudaStream_t stream) {
  const std::size_t count = rows.size();
  const Memory row_memory(rows), token_memory(count * 4);
  void* pinned = nullptr;
  DZ_CUDA(cudaHostAlloc(&pinned, count * sizeof(SampledToken), cudaHostAllocDefault));
  std::memset(pinned, 0x5A, count * sizeof(SampledToken));
  const Memory scratch(sample_scratch_bytes(vocab, kScratchCtas));
  launch_sample({logits.get(), row_memory.get<SamplingRow>(), static_cast<SampledToken*>(pinned),
                 token_memory.get<std::int32_t>(), static_cast<std::int64_t>(count), vocab, dtype,
                 scratch.get<std::uint32_t>(), kScratchCtas},
                stream);
  DZ_CUDA(cudaStreamSynchronize(stream));
  std::vector<SampledToken> result(count);
  std::memcpy(static_cast<void*>(result.data()), pinned, count * sizeof(SampledToken));
  cudaFreeHost(pinned);
  tokens = token_memory.read<std::int32_t>();
  return result;
}

bool same_result(const SampledToken& a, const SampledToken& b) {
  return a.token == b.token && a.logprob == b.logprob && a.rank == b.rank &&
         a.num_top == b.num_top && a.is_finite == b.is_finite &&
         std::equal(a.top_tokens, a.top_tokens + a.num_top, b.top_tokens) &&
         std::equal(a.top_logprobs, a.top_logprobs + a.num_top, b.top_logprobs);
}

struct Tally {
  int num_drawn = 0, num_other = 0;
};

void compare(Report& report, const SampledToken& device, const SampledToken& host,
             const SamplingRow& row, const std::string& what, Tally& tally) {
  report.expect(device.is_finite == host.is_finite, what + ": is_finite");
  if (!host.is_finite || !device.is_finite) return;
  const bool is_exact = row.forced_token >= 0 || row.temperature < 1e-5F || row.top_k == 1;
  ++tally.num_drawn;
  if (device.token != host.token) {
    ++tally.num_other;
    report.expect(!is_exact, what + ": token " + std::to_string(device.token) + ", expected " +
                                 std::to_string(host.token));
    return;  // the rest is of another token
  }
  report.expect(device.rank == host.rank, what + ": rank " + std::to_string(device.rank) +
                                              ", expected " + std::to_string(host.rank));
  report.expect(std::abs(device.logprob - host.logprob) < 2e-5F, what + ": logprob");
  report.expect(device.num_top == host.num_top, what + ": num_top");
  for (std::int32_t i = 0; i < std::min(device.num_top, host.num_top); ++i) {
    report.expect(device.top_tokens[i] == host.top_tokens[i], what + ": alternative");
    report.expect(std::abs(device.top_logprobs[i] - host.top_logprobs[i]) < 2e-5F,
                  what + ": alternative's logprob");
  }
}

void check_special(Report& report, cudaStream_t stream) {
  const float inf = std::numeric_limits<float>::infinity();
  const auto run = [&](const std::vector<float>& logits, SamplingRow row) {
    const Memory memory(logits);
    std::vector<std::int32_t> tokens;
    return sample_on_device(memory, DType::kFloat32, {row},
                            static_cast<std::int64_t>(logits.size()), tokens, stream)[0];
  };
  for (const float bad : {std::nanf(""), -std::nanf(""), inf}) {
    for (const std::size_t place : {0, 5, 99}) {
      std::vector<float> logits(100, 0.5F);
      logits[place] = bad;
      report.expect(!run(logits, {.temperature = 0.0F}).is_finite, "non-finite, greedy");
      report.expect(!run(logits, {.temperature = 1.0F}).is_finite, "non-finite, drawn");
    }
  }
  report.expect(!run(std::vector<float>(33, -inf), {.temperature = 0.0F}).is_finite, "all -inf");
  const SampledToken only = run({-inf, 1.0F, -inf}, {.temperature = 1.0F, .num_logprobs = 5});
  report.expect(only.is_finite && only.token == 1 && only.num_top == 1, "one finite logit");
  report.expect(run({-0.0F, 0.0F, -1.0F}, {.temperature = 0.0F}).token == 0, "zeros are equal");
  // Equal logits everywhere: top-k and top-p keep the lowest tokens.
  const std::vector<float> flat(3000, 1.0F);
  std::int32_t highest = 0;
  for (std::uint64_t i = 0; i < 200; ++i) {
    highest = std::max(highest, run(flat, {.top_k = 7, .seed = i}).token);
  }
  report.expect(highest == 6, "top-k of equals");
  highest = 0;
  for (std::uint64_t i = 0; i < 200; ++i) {
    highest = std::max(highest, run(flat, {.top_p = 0.01F, .seed = i}).token);
  }
  report.expect(highest == 29, "top-p of equals");
  const SampledToken top = run(flat, {.temperature = 0.0F, .num_logprobs = 20});
  for (std::int32_t i = 0; i < 20; ++i) report.expect(top.top_tokens[i] == i, "top of equals");
}

}  // namespace

void check_sampling(Report& report, cudaStream_t stream) {
  const auto cpu = make_backend("cpu");
  const auto cpu_stream = cpu->create_stream();
  Rng rng(7);
  Tally tally;
  check_special(report, stream);
  for (const std::int64_t vocab : {1, 7, 100, 1000, 32000, 49152, 50257, 128256, 262144}) {
    for (const float scale : {0.5F, 3.0F, 8.0F}) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        const std::int64_t count = vocab > 60000 ? 12 : 37;
        std::vector<float> logits = random_floats(at(count * vocab), scale, rng);
        std::vector<std::uint16_t> words;
        if (dtype != DType::kFloat32) {  // many ties
          for (const float value : logits) words.push_back(round_to(dtype, value));
          logits = widen(dtype, words);
        }
        const Memory memory = words.empty() ? Memory(logits) : Memory(words);
        const Rows rows = random_rows(count, vocab, rng);
        std::vector<SampledToken> host(at(count));
        cpu->ops().sample(host, {logits.data(), DType::kFloat32, {count, vocab}}, rows.rows,
                          *cpu_stream);
        std::vector<Memory> lists;
        const std::vector<SamplingRow> on_device = rows.on_device(lists);
        std::vector<std::int32_t> tokens;
        const auto device = sample_on_device(memory, dtype, on_device, vocab, tokens, stream);
        for (std::size_t i = 0; i < at(count); ++i) {
          const std::string what = "sample vocab " + std::to_string(vocab) + " scale " +
                                   std::to_string(scale) + " " + std::string(name(dtype)) +
                                   " row " + std::to_string(i);
          compare(report, device[i], host[i], rows.rows[i], what, tally);
          report.expect(tokens[i] == std::max(device[i].token, 0), what + ": token on the device");
        }
        // The last row alone, and all again, give the same bits.
        const auto again = sample_on_device(memory, dtype, on_device, vocab, tokens, stream);
        for (std::size_t i = 0; i < at(count); ++i) {
          report.expect(same_result(device[i], again[i]), "a second run");
        }
        const std::size_t bytes = size_of(dtype) * at(vocab);
        std::vector<std::byte> last(bytes);
        DZ_CUDA(cudaMemcpy(last.data(), memory.get<std::byte>() + (at(count) - 1) * bytes, bytes,
                           cudaMemcpyDeviceToHost));
        const auto alone =
            sample_on_device(Memory(last), dtype, {on_device.back()}, vocab, tokens, stream);
        report.expect(same_result(alone[0], device.back()), "a row alone");
      }
    }
  }
  std::printf("sampling: %d of %d tokens differ from the CPU's, by rounding\n", tally.num_other,
              tally.num_drawn);
  report.expect(tally.num_other * 200 <= tally.num_drawn, "more than one token in 200 differs");
}

void time_sampling(cudaStream_t stream) {
  int num_sms = 0;
  DZ_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  Rng rng(3);
  std::printf(
      "\nus a launch, 200 in a graph   greedy  drawn  top_p  top_k+p  penalties  logprobs20\n");
  for (const std::int64_t vocab : {32000, 49152, 128256}) {
    for (const std::int64_t rows : {1, 32, 128}) {
      const Memory logits(random_floats(at(rows * vocab), 3.0F, rng));
      const Memory results(at(rows) * sizeof(SampledToken)), tokens(at(rows) * 4);
      std::vector<std::int32_t> history(2000);
      for (std::int32_t& token : history) token = static_cast<std::int32_t>(rng() % at(vocab));
      const Memory history_memory(history);
      const SamplingRow greedy{.temperature = 0.0F}, drawn{.temperature = 1.0F, .seed = 1};
      SamplingRow top_p = drawn, top_k = drawn, penalties = greedy, logprobs = greedy;
      top_p.top_p = 0.9F;
      top_k.top_k = 50;
      top_k.top_p = 0.9F;
      penalties.repetition_penalty = 1.1F;
      penalties.prompt_tokens = penalties.output_tokens = history_memory.get<std::int32_t>();
      penalties.num_prompt_tokens = penalties.num_output_tokens = 2000;
      logprobs.num_logprobs = 20;
      const Memory scratch(sample_scratch_bytes(vocab, num_sms));
      const auto time = [&](const SamplingRow& row) {
        const Memory row_memory(std::vector<SamplingRow>(at(rows), row));
        return time_in_graph(stream, [&] {
          launch_sample({logits.get(), row_memory.get<SamplingRow>(), results.get<SampledToken>(),
                         tokens.get<std::int32_t>(), rows, vocab, DType::kFloat32,
                         scratch.get<std::uint32_t>(), num_sms},
                        stream);
        });
      };
      std::printf("%6d tokens x %3d rows %11.2f %6.2f %6.2f %8.2f %10.2f %11.2f\n",
                  static_cast<int>(vocab), static_cast<int>(rows), time(greedy), time(drawn),
                  time(top_p), time(top_k), time(penalties), time(logprobs));
    }
  }
}

}  // namespace deltazip::cuda::check
