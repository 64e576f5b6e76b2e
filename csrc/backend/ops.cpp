#include "deltazip/backend/ops.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "deltazip/backend/backend.h"
#include "deltazip/base/error.h"

namespace deltazip {
namespace {

template <typename Tensor>
void check_matrix(const char* op, const char* what, const Tensor& tensor) {
  DZ_CHECK(tensor.rank() == 2, op, ": ", what, " must be a matrix, got ", tensor.shape.str());
  DZ_CHECK(is_floating(tensor.dtype), op, ": ", what, " must hold floating-point numbers, got ",
           name(tensor.dtype));
  DZ_CHECK(tensor.data != nullptr || tensor.num_elements() == 0, op, ": ", what, " has no data");
}

template <typename Tensor>
void check_matrix(const char* op, const char* what, const Tensor& tensor, std::int64_t rows,
                  std::int64_t columns, DType dtype) {
  check_matrix(op, what, tensor);
  DZ_CHECK(tensor.size(0) == rows && tensor.size(1) == columns, op, ": ", what, " must be [", rows,
           ", ", columns, "], got ", tensor.shape.str());
  DZ_CHECK(tensor.dtype == dtype, op, ": ", what, " must be ", name(dtype), ", got ",
           name(tensor.dtype));
}

void check_count(const char* op, const char* what, std::size_t count, std::int64_t expected) {
  DZ_CHECK(static_cast<std::int64_t>(count) == expected, op, ": expected ", expected, " ", what,
           ", got ", count);
}

void check_index(const char* op, const char* what, std::int64_t index, std::int64_t bound,
                 std::int64_t row) {
  DZ_CHECK(index >= 0 && index < bound, op, ": ", what, " ", index, " of row ", row,
           " is not in [0, ", bound, ")");
}

void check_weight(const char* op, const PackedMatrix& weight) {
  DZ_CHECK(weight.data != nullptr && weight.rows > 0 && weight.columns > 0, op,
           ": the weight is empty, [", weight.rows, ", ", weight.columns, "]");
  DZ_CHECK(is_floating(weight.dtype), op, ": the weight must be floating-point, got ",
           name(weight.dtype));
}

void check_delta(const char* op, const DeltaMatrix& delta) {
  DZ_CHECK(delta.rows > 0 && delta.columns > 0, op, ": a delta is empty, [", delta.rows, ", ",
           delta.columns, "]");
  DZ_CHECK(delta.group_size > 0 && delta.group_size % kDeltaBlockColumns == 0, op,
           ": a delta's group_size must be a positive multiple of ", kDeltaBlockColumns, ", got ",
           delta.group_size);
}

void check_cache(const char* op, const KvLayer& cache) {
  DZ_CHECK(cache.keys != nullptr && cache.values != nullptr, op, ": the KV cache has no data");
  DZ_CHECK(
      cache.num_blocks > 0 && cache.num_kv_heads > 0 && cache.block_size > 0 && cache.head_dim > 0,
      op, ": the KV cache must not be empty, got [", cache.num_blocks, ", ", cache.num_kv_heads,
      ", ", cache.block_size, ", ", cache.head_dim, "]");
  DZ_CHECK(is_floating(cache.dtype), op, ": the KV cache must be floating-point, got ",
           name(cache.dtype));
}

std::int64_t check_heads(const char* op, const KvLayer& cache, std::int32_t num_heads) {
  DZ_CHECK(num_heads > 0 && num_heads % cache.num_kv_heads == 0, op, ": num_heads ", num_heads,
           " must be a positive multiple of num_kv_heads ", cache.num_kv_heads);
  return std::int64_t{num_heads + 2 * cache.num_kv_heads} * cache.head_dim;
}

void check_tokens(const char* what, const std::int32_t* tokens, std::int32_t count,
                  std::int64_t vocab_size, std::int64_t row) {
  DZ_CHECK(count >= 0 && (count == 0 || tokens != nullptr), "sample: row ", row, " has ", count,
           " ", what, " and no pointer to them");
  for (std::int32_t i = 0; i < count; ++i) check_index("sample", what, tokens[i], vocab_size, row);
}

void check_range(const char* what, float value, bool is_valid, const char* range,
                 std::int64_t row) {
  DZ_CHECK(is_valid, "sample: ", what, " of row ", row, " must be ", range, ", got ", value);
}

void check_sampling(const SamplingRow& s, std::int64_t vocab_size, std::int64_t row) {
  check_range("temperature", s.temperature, s.temperature >= 0 && std::isfinite(s.temperature),
              "0 or more", row);
  check_range("top_p", s.top_p, s.top_p > 0 && s.top_p <= 1, "in (0, 1]", row);
  check_range("min_p", s.min_p, s.min_p >= 0 && s.min_p <= 1, "in [0, 1]", row);
  check_range("repetition_penalty", s.repetition_penalty,
              s.repetition_penalty > 0 && std::isfinite(s.repetition_penalty), "positive", row);
  check_range("presence_penalty", s.presence_penalty, std::isfinite(s.presence_penalty), "finite",
              row);
  check_range("frequency_penalty", s.frequency_penalty, std::isfinite(s.frequency_penalty),
              "finite", row);
  DZ_CHECK(s.num_logprobs >= -1 && s.num_logprobs <= kMaxLogprobs, "sample: num_logprobs of row ",
           row, " must be -1 to ", kMaxLogprobs, ", got ", s.num_logprobs);
  DZ_CHECK(s.forced_token < vocab_size, "sample: forced_token ", s.forced_token, " of row ", row,
           " is not in [0, ", vocab_size, ")");
  const bool uses_history =
      s.repetition_penalty != 1 || s.presence_penalty != 0 || s.frequency_penalty != 0;
  if (uses_history) {
    check_tokens("prompt token", s.prompt_tokens, s.num_prompt_tokens, vocab_size, row);
    check_tokens("output token", s.output_tokens, s.num_output_tokens, vocab_size, row);
  }
  check_tokens("banned token", s.banned_tokens, s.num_banned_tokens, vocab_size, row);
  DZ_CHECK(s.num_biases >= 0 && (s.num_biases == 0 || s.biases != nullptr), "sample: row ", row,
           " has ", s.num_biases, " biases and no pointer to them");
  for (std::int32_t i = 0; i < s.num_biases; ++i) {
    check_index("sample", "biased token", s.biases[i].token, vocab_size, row);
    check_range("logit bias", s.biases[i].bias, std::isfinite(s.biases[i].bias), "finite", row);
  }
}

// A product's output: of x's dtype, or float32 where the sums themselves are wanted.
void check_product(const char* op, TensorView y, ConstTensorView x) {
  check_matrix(op, "x", x);
  check_matrix(op, "y", y);
  DZ_CHECK(x.size(0) == y.size(0), op, ": x has ", x.size(0), " rows, y has ", y.size(0));
  DZ_CHECK(y.dtype == x.dtype || y.dtype == DType::kFloat32, op, ": y must be ", name(x.dtype),
           " like x, or float32, got ", name(y.dtype));
}

LinearParams check_linear(const char* op, TensorView y, ConstTensorView x,
                          const PackedMatrix& weight) {
  check_weight(op, weight);
  check_product(op, y, x);
  DZ_CHECK(x.size(1) == weight.columns, op, ": x must have ", weight.columns,
           " columns like the weight [", weight.rows, ", ", weight.columns, "], got ",
           x.shape.str());
  DZ_CHECK(y.size(1) == weight.rows, op, ": y must have ", weight.rows,
           " columns like the weight's rows, got ", y.shape.str());
  return {x.data, y.data, weight, x.size(0), x.dtype, y.dtype};
}

bool is_empty(const SbmmTask& task) { return task.delta.data == nullptr || task.num_rows == 0; }

bool same_rows(const SbmmTask& a, const SbmmTask& b) {
  return a.first_row == b.first_row && a.num_rows == b.num_rows;
}

// By rows, then by columns: two tasks that share elements become neighbours, unless their rows
// overlap without being equal, which no batch needs and which is refused.
void check_disjoint(const char* op, std::span<const SbmmTask> tasks) {
  thread_local std::vector<std::int32_t> order;  // a step asks this often
  order.clear();
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    if (!is_empty(tasks[t])) order.push_back(static_cast<std::int32_t>(t));
  }
  const auto task = [&](std::size_t i) -> const SbmmTask& {
    return tasks[static_cast<std::size_t>(order[i])];
  };
  const auto place = [&](std::int32_t t) {
    const SbmmTask& each = tasks[static_cast<std::size_t>(t)];
    return std::tuple(each.first_row, each.num_rows, each.out_offset);
  };
  // A model gives them in this order; sorting all of them would cost as much as a step's launches.
  if (!std::ranges::is_sorted(order, {}, place)) std::ranges::sort(order, {}, place);
  for (std::size_t i = 1; i < order.size(); ++i) {
    const SbmmTask& before = task(i - 1);
    const SbmmTask& after = task(i);
    const bool are_disjoint = same_rows(before, after)
                                  ? before.out_offset + before.delta.rows <= after.out_offset
                                  : before.first_row + before.num_rows <= after.first_row;
    DZ_CHECK(are_disjoint, op, ": tasks ", std::min(order[i - 1], order[i]), " and ",
             std::max(order[i - 1], order[i]),
             " write the same elements, or rows that overlap without being the same");
  }
}

SbmmParams check_sbmm(const char* op, TensorView y, ConstTensorView x,
                      std::span<const SbmmTask> tasks) {
  check_product(op, y, x);
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    const SbmmTask& task = tasks[t];
    DZ_CHECK(task.first_row >= 0 && task.num_rows >= 0 &&
                 std::int64_t{task.first_row} + task.num_rows <= x.size(0),
             op, ": task ", t, " covers rows [", task.first_row, ", ",
             std::int64_t{task.first_row} + task.num_rows, ") of ", x.size(0));
    if (task.delta.data == nullptr) continue;
    check_delta(op, task.delta);
    DZ_CHECK(task.delta.columns == x.size(1), op, ": the delta of task ", t, " has ",
             task.delta.columns, " columns, x has ", x.size(1));
    DZ_CHECK(task.out_offset >= 0 && task.out_offset + task.delta.rows <= y.size(1), op, ": task ",
             t, " writes columns [", task.out_offset, ", ", task.out_offset + task.delta.rows,
             ") of ", y.size(1));
  }
  check_disjoint(op, tasks);
  return {x.data,    y.data,    tasks.data(), static_cast<std::int32_t>(tasks.size()),
          x.size(0), x.size(1), y.size(1),    x.dtype,
          y.dtype};
}

}  // namespace

void Ops::embed(TensorView out, std::span<const std::int32_t> tokens, const PackedMatrix& table,
                std::span<const DeltaMatrix* const> row_deltas, Stream& stream,
                std::span<const std::int32_t> sampled) {
  check_weight("embed", table);
  check_matrix("embed", "out", out);
  const std::int64_t num_rows = out.size(0);
  DZ_CHECK(out.size(1) == table.columns, "embed: out must have ", table.columns,
           " columns like the table, got ", out.shape.str());
  check_count("embed", "tokens", tokens.size(), num_rows);
  check_count("embed", "deltas", row_deltas.size(), num_rows);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const auto i = static_cast<std::size_t>(row);
    if (tokens[i] < 0) {
      check_index("embed", "sampled token", ~tokens[i], static_cast<std::int64_t>(sampled.size()),
                  row);
    } else {
      check_index("embed", "token", tokens[i], table.rows, row);
    }
    if (row_deltas[i] == nullptr || row_deltas[i]->data == nullptr) continue;
    const DeltaMatrix& delta = *row_deltas[i];
    check_delta("embed", delta);
    DZ_CHECK(delta.rows == table.rows && delta.columns == table.columns, "embed: the delta of row ",
             row, " is [", delta.rows, ", ", delta.columns, "], the table [", table.rows, ", ",
             table.columns, "]");
  }
  if (num_rows == 0) return;
  run(EmbedParams{tokens.data(), table, row_deltas.data(), out.data, num_rows, out.dtype,
                  sampled.data()},
      stream);
}

void Ops::linear(TensorView y, ConstTensorView x, const PackedMatrix& weight, Stream& stream) {
  const LinearParams params = check_linear("linear", y, x, weight);
  if (params.num_rows > 0) run(params, stream);
}

void Ops::sbmm(TensorView y, ConstTensorView x, std::span<const SbmmTask> tasks, Stream& stream) {
  const SbmmParams params = check_sbmm("sbmm", y, x, tasks);
  if (params.num_tasks > 0 && params.num_rows > 0) run(params, stream);
}

void Ops::project(TensorView y, ConstTensorView x, const PackedMatrix& weight,
                  std::span<const SbmmTask> tasks, Stream& stream) {
  const ProjectParams params{check_linear("project", y, x, weight),
                             check_sbmm("project", y, x, tasks)};
  if (params.base.num_rows > 0) run(params, stream);
}

void Ops::run(const ProjectParams& params, Stream& stream) {
  run(params.base, stream);
  if (params.deltas.num_tasks > 0) run(params.deltas, stream);
}

void Ops::bias_add(TensorView y, std::span<const float* const> row_biases, Stream& stream) {
  check_matrix("bias_add", "y", y);
  check_count("bias_add", "biases", row_biases.size(), y.size(0));
  if (y.num_elements() == 0) return;
  run(BiasAddParams{y.data, row_biases.data(), y.size(0), y.size(1), y.dtype}, stream);
}

void Ops::rms_norm(TensorView out, TensorView residual, ConstTensorView x,
                   std::span<const float* const> row_gains, float epsilon, Stream& stream) {
  check_matrix("rms_norm", "residual", residual);
  check_matrix("rms_norm", "out", out, residual.size(0), residual.size(1), residual.dtype);
  if (x.data != nullptr) {
    check_matrix("rms_norm", "x", x, residual.size(0), residual.size(1), residual.dtype);
  }
  check_count("rms_norm", "gains", row_gains.size(), residual.size(0));
  DZ_CHECK(epsilon >= 0 && std::isfinite(epsilon), "rms_norm: epsilon must be 0 or more, got ",
           epsilon);
  for (std::size_t row = 0; row < row_gains.size(); ++row) {
    DZ_CHECK(row_gains[row] != nullptr, "rms_norm: row ", row, " has no gain");
  }
  if (residual.num_elements() == 0) return;
  run(RmsNormParams{x.data, residual.data, out.data, row_gains.data(), epsilon, residual.size(0),
                    residual.size(1), residual.dtype},
      stream);
}

void Ops::silu_mul(TensorView out, ConstTensorView gate_up, Stream& stream) {
  check_matrix("silu_mul", "gate_up", gate_up);
  DZ_CHECK(gate_up.size(1) % 2 == 0, "silu_mul: gate_up must have an even number of columns, got ",
           gate_up.shape.str());
  check_matrix("silu_mul", "out", out, gate_up.size(0), gate_up.size(1) / 2, gate_up.dtype);
  if (out.num_elements() == 0) return;
  run(SiluMulParams{gate_up.data, out.data, out.size(0), out.size(1), out.dtype}, stream);
}

void Ops::rope_append(TensorView qkv, ConstTensorView cos_sin,
                      std::span<const std::int32_t> angle_rows,
                      std::span<const std::int64_t> cache_slots, const KvLayer& cache,
                      std::int32_t num_heads, Stream& stream) {
  check_cache("rope_append", cache);
  DZ_CHECK(cache.head_dim % 2 == 0, "rope_append: head_dim must be even, got ", cache.head_dim);
  const std::int64_t row_size = check_heads("rope_append", cache, num_heads);
  check_matrix("rope_append", "qkv", qkv);
  const std::int64_t num_rows = qkv.size(0);
  DZ_CHECK(qkv.size(1) == row_size, "rope_append: qkv must have ", row_size, " columns, got ",
           qkv.shape.str());
  check_matrix("rope_append", "cos_sin", cos_sin);
  DZ_CHECK(cos_sin.dtype == DType::kFloat32 && cos_sin.size(1) == cache.head_dim,
           "rope_append: cos_sin must be float32 [angles, ", cache.head_dim, "], got ",
           name(cos_sin.dtype), " ", cos_sin.shape.str());
  check_count("rope_append", "angle rows", angle_rows.size(), num_rows);
  check_count("rope_append", "cache slots", cache_slots.size(), num_rows);
  const std::int64_t num_slots = std::int64_t{cache.num_blocks} * cache.block_size;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const auto i = static_cast<std::size_t>(row);
    check_index("rope_append", "angle row", angle_rows[i], cos_sin.size(0), row);
    if (cache_slots[i] != -1)
      check_index("rope_append", "cache slot", cache_slots[i], num_slots, row);
  }
  if (num_rows == 0) return;
  run(RopeAppendParams{qkv.data, static_cast<const float*>(cos_sin.data), angle_rows.data(),
                       cache_slots.data(), cache, num_rows, num_heads, qkv.dtype},
      stream);
}

void Ops::paged_attention(TensorView out, ConstTensorView qkv, const KvLayer& cache,
                          std::span<const AttentionSequence> sequences, std::int32_t num_heads,
                          float scale, Stream& stream) {
  check_cache("paged_attention", cache);
  const std::int64_t row_size = check_heads("paged_attention", cache, num_heads);
  check_matrix("paged_attention", "qkv", qkv);
  DZ_CHECK(qkv.size(1) == row_size, "paged_attention: qkv must have ", row_size, " columns, got ",
           qkv.shape.str());
  check_matrix("paged_attention", "out", out, qkv.size(0), std::int64_t{num_heads} * cache.head_dim,
               qkv.dtype);
  DZ_CHECK(std::isfinite(scale), "paged_attention: scale must be finite, got ", scale);
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const AttentionSequence& sequence = sequences[s];
    DZ_CHECK(sequence.first_row >= 0 && sequence.num_rows >= 0 &&
                 std::int64_t{sequence.first_row} + sequence.num_rows <= qkv.size(0),
             "paged_attention: sequence ", s, " covers rows [", sequence.first_row, ", ",
             std::int64_t{sequence.first_row} + sequence.num_rows, ") of ", qkv.size(0));
    DZ_CHECK(sequence.context_length >= sequence.num_rows, "paged_attention: sequence ", s, " has ",
             sequence.num_rows, " rows but only ", sequence.context_length, " keys");
    if (sequence.num_rows == 0) continue;
    DZ_CHECK(sequence.blocks != nullptr, "paged_attention: sequence ", s, " has no blocks");
    const std::int32_t num_blocks =
        (sequence.context_length + cache.block_size - 1) / cache.block_size;
    // As unsigned, so that one comparison sees both ends.
    std::uint32_t largest = 0;
    for (std::int32_t b = 0; b < num_blocks; ++b) {
      largest = std::max(largest, static_cast<std::uint32_t>(sequence.blocks[b]));
    }
    DZ_CHECK(largest < static_cast<std::uint32_t>(cache.num_blocks), "paged_attention: block ",
             static_cast<std::int32_t>(largest), " of sequence ", s, " is not in [0, ",
             cache.num_blocks, ")");
  }
  if (sequences.empty() || qkv.size(0) == 0) return;
  run(PagedAttentionParams{qkv.data, out.data, cache, sequences.data(),
                           static_cast<std::int32_t>(sequences.size()), num_heads, scale,
                           qkv.size(0), qkv.dtype},
      stream);
}

void Ops::gather_rows(TensorView out, ConstTensorView x, std::span<const std::int32_t> rows,
                      Stream& stream) {
  DZ_CHECK(x.rank() == 2, "gather_rows: x must be a matrix, got ", x.shape.str());
  DZ_CHECK(out.rank() == 2 && out.size(1) == x.size(1), "gather_rows: out must be [", rows.size(),
           ", ", x.size(1), "], got ", out.shape.str());
  DZ_CHECK(out.dtype == x.dtype, "gather_rows: x is ", name(x.dtype), ", out is ", name(out.dtype));
  check_count("gather_rows", "rows", rows.size(), out.size(0));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    check_index("gather_rows", "source", rows[i], x.size(0), static_cast<std::int64_t>(i));
  }
  if (out.num_elements() == 0) return;
  DZ_CHECK(out.data != nullptr && x.data != nullptr, "gather_rows: x or out has no data");
  run(GatherRowsParams{x.data, out.data, rows.data(), out.size(0), x.size(1), x.dtype}, stream);
}

void Ops::sample(std::span<SampledToken> out, ConstTensorView logits,
                 std::span<const SamplingRow> rows, Stream& stream,
                 std::span<std::int32_t> tokens) {
  check_matrix("sample", "logits", logits);
  check_count("sample", "rows", rows.size(), logits.size(0));
  check_count("sample", "results", out.size(), logits.size(0));
  if (!tokens.empty()) check_count("sample", "places for tokens", tokens.size(), logits.size(0));
  if (rows.empty()) return;
  DZ_CHECK(logits.size(1) > 0, "sample: the vocabulary is empty");
  for (std::size_t row = 0; row < rows.size(); ++row) {
    check_sampling(rows[row], logits.size(1), static_cast<std::int64_t>(row));
  }
  run(SampleParams{logits.data, rows.data(), out.data(), logits.size(0), logits.size(1),
                   logits.dtype, tokens.empty() ? nullptr : tokens.data()},
      stream);
}

}  // namespace deltazip
