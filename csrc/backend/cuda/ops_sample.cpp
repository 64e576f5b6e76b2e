// Sampling: stages what rows ask for beyond their numbers, and brings the results back.

#include <algorithm>
#include <bit>
#include <memory>
#include <span>
#include <vector>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/cuda_ops.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/kernels/sample/sample.h"
#include "backend/sampling_rules.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

// Rows whose histories together are larger than this go in launches of their own: a step's
// arguments have a bound, the contexts of a batch have none worth the name.
constexpr std::size_t kMaxListWords = std::size_t{1} << 20;

// The lists of some rows, one after the other: what the device needs and no more.
class Lists {
 public:
  // Appends the row's lists; false, and nothing done, if they would be too many beside others.
  bool append(const SamplingRow& row) {
    const bool is_scored = row.forced_token >= 0;
    const bool has_history = !is_scored && uses_history(row);
    const Part part{
        .prompt = has_history && row.repetition_penalty != 1.0F ? row.num_prompt_tokens : 0,
        .output = has_history ? row.num_output_tokens : 0,
        .biases = is_scored ? 0 : row.num_biases,
        .banned = is_scored ? 0 : row.num_banned_tokens,
        .first = words_.size()};
    const std::size_t size =
        2 * at(part.biases) + at(part.prompt) + at(part.output) + at(part.banned) + 1;
    if (!parts_.empty() && words_.size() + size > kMaxListWords) return false;
    append_biases({row.biases, at(part.biases)});
    append_tokens(row.prompt_tokens, part.prompt);
    append_tokens(row.output_tokens, part.output);
    append_tokens(row.banned_tokens, part.banned);
    if (words_.size() % 2 != 0) words_.push_back(0);  // the next row's biases are pairs
    rows_.push_back(row);
    parts_.push_back(part);
    return true;
  }
  void clear() {
    words_.clear();
    rows_.clear();
    parts_.clear();
  }
  std::size_t num_rows() const { return rows_.size(); }

  // The rows, on the device, with pointers of the device.
  const SamplingRow* put(StepArgs& args, CudaStream& stream) {
    const std::int32_t* list =
        words_.empty() ? nullptr : args.put(std::span<const std::int32_t>(words_), stream);
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      SamplingRow& row = rows_[i];
      const Part& part = parts_[i];
      const std::int32_t* next = list == nullptr ? nullptr : list + part.first;
      row.num_biases = part.biases;
      row.num_prompt_tokens = part.prompt;
      row.num_output_tokens = part.output;
      row.num_banned_tokens = part.banned;
      row.biases = reinterpret_cast<const TokenBias*>(next);
      row.prompt_tokens = next == nullptr ? nullptr : next + 2 * part.biases;
      row.output_tokens = next == nullptr ? nullptr : row.prompt_tokens + part.prompt;
      row.banned_tokens = next == nullptr ? nullptr : row.output_tokens + part.output;
    }
    return args.put(std::span<const SamplingRow>(rows_), stream);
  }

 private:
  struct Part {
    std::int32_t prompt, output, biases, banned;  // how many of each
    std::size_t first;                            // in words_
  };

  static std::size_t at(std::int32_t count) { return static_cast<std::size_t>(count); }

  void append_tokens(const std::int32_t* tokens, std::int32_t count) {
    if (count > 0) words_.insert(words_.end(), tokens, tokens + count);
  }
  // By token, equal tokens in their order: one thread adds up what falls on a token.
  void append_biases(std::span<const TokenBias> biases) {
    sorted_.assign(biases.begin(), biases.end());
    std::ranges::stable_sort(sorted_, {}, &TokenBias::token);
    for (const TokenBias& bias : sorted_) {
      words_.push_back(bias.token);
      words_.push_back(std::bit_cast<std::int32_t>(bias.bias));
    }
  }

  std::vector<std::int32_t> words_;
  std::vector<SamplingRow> rows_;
  std::vector<Part> parts_;
  std::vector<TokenBias> sorted_;
};

// Pinned memory that the kernel writes its results to. One launch's, until its stream has passed.
struct Results {
  explicit Results(std::size_t capacity_) : capacity(capacity_) {
    void* memory = nullptr;
    DZ_CUDA(cudaHostAlloc(&memory, capacity * sizeof(SampledToken), cudaHostAllocDefault));
    rows = static_cast<SampledToken*>(memory);
    std::uninitialized_value_construct_n(rows, capacity);
  }
  ~Results() { cudaFreeHost(rows); }
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;

  SampledToken* rows = nullptr;
  std::size_t capacity;
  bool is_pending = false;
};

}  // namespace

struct CudaOps::SampleState {
  std::shared_ptr<Results> results_for(std::size_t num_rows) {
    const auto found = std::ranges::find_if(
        results, [&](const auto& each) { return !each->is_pending && each->capacity >= num_rows; });
    if (found != results.end()) return *found;
    constexpr std::size_t kMinRows = 64;  // so that a few blocks serve all sizes
    results.push_back(std::make_shared<Results>(std::max(kMinRows, std::bit_ceil(num_rows))));
    return results.back();
  }

  // Where rows lie while they are sampled, if not in clusters. One stream samples.
  std::uint32_t* scratch_for(std::int64_t vocab_size, int num_sms) {
    const std::size_t num_bytes = sample_scratch_bytes(vocab_size, num_sms);
    if (num_bytes > scratch.num_bytes()) scratch = DeviceMemory(num_bytes);
    return static_cast<std::uint32_t*>(scratch.data());
  }

  Lists lists;
  std::vector<std::shared_ptr<Results>> results;
  DeviceMemory scratch;
};

std::shared_ptr<CudaOps::SampleState> CudaOps::make_sample_state() {
  return std::make_shared<SampleState>();
}

void CudaOps::check_sampling(std::int64_t vocab_size) const {
  const std::int64_t max_vocab = max_sample_vocab(info_.shared_bytes_per_block);
  DZ_CHECK(vocab_size <= max_vocab, "sample: this CUDA device takes vocabularies of up to ",
           max_vocab, " tokens, got ", vocab_size);
}

void CudaOps::run(const SampleParams& params, Stream& stream) {
  check_sampling(params.vocab_size);
  DZ_INTERNAL(args_.mode() == StepMode::kEager, "sampling is not part of a recorded step");
  CudaStream& queue = to_cuda(stream);
  const std::int64_t row_bytes =
      params.vocab_size * static_cast<std::int64_t>(size_of(params.dtype));
  Lists& lists = sample_->lists;
  for (std::int64_t first = 0; first < params.num_rows;) {
    lists.clear();
    while (first + static_cast<std::int64_t>(lists.num_rows()) < params.num_rows &&
           lists.append(params.rows[first + static_cast<std::int64_t>(lists.num_rows())])) {
    }
    const std::size_t count = lists.num_rows();
    const std::shared_ptr<Results> results = sample_->results_for(count);
    launch_sample({.logits = static_cast<const char*>(params.logits) + first * row_bytes,
                   .rows = lists.put(args_, queue),
                   .results = results->rows,
                   .tokens = params.tokens == nullptr ? nullptr : params.tokens + first,
                   .num_rows = static_cast<std::int64_t>(count),
                   .vocab_size = params.vocab_size,
                   .dtype = params.dtype,
                   .scratch = sample_->scratch_for(params.vocab_size, info_.num_sms),
                   .num_sms = info_.num_sms},
                  queue.get());
    results->is_pending = true;
    queue.when_passed([results, count, out = params.out + first] {
      std::copy_n(results->rows, count, out);
      results->is_pending = false;
    });
    first += static_cast<std::int64_t>(count);
  }
}

}  // namespace deltazip::cuda
