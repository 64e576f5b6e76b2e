// A whole decoder layer as one step: ops follow each other without a pause, then as a recorded step
// that is replayed with other contents of the same shapes.

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>

#include "backend/harness.h"

namespace deltazip::testing {
namespace {

constexpr std::int64_t kHidden = 128, kInner = 192, kVocab = 200;
constexpr std::int32_t kHeads = 4, kKvHeads = 2, kHeadDim = 64, kBlockSize = 8, kNumBlocks = 100;
constexpr std::int64_t kQ = kHeads * kHeadDim, kKv = kKvHeads * kHeadDim;
constexpr std::int64_t kAngles = 64;
constexpr std::size_t kSegments = 3, kVariants = 3;  // two deltas, and the base

struct Variant {
  Variant(Backend& backend, DeltaType type, std::int32_t group_size, Rng& rng)
      : embedding(backend, type, kVocab, kHidden, group_size, rng),
        q(backend, type, kQ, kHidden, group_size, rng),
        k(backend, type, kKv, kHidden, group_size, rng),
        v(backend, type, kKv, kHidden, group_size, rng),
        o(backend, type, kHidden, kQ, group_size, rng),
        gate_up(backend, type, 2 * kInner, kHidden, group_size, rng),
        down(backend, type, kHidden, kInner, group_size, rng) {}
  Delta embedding, q, k, v, o, gate_up, down;
};

// What a step is told in host arrays: of one shape whatever they hold.
struct Content {
  std::vector<std::int32_t> tokens, angle_rows;
  std::vector<std::int64_t> cache_slots;
  std::vector<const DeltaMatrix*> embeddings;
  std::vector<const float*> first_gains, second_gains, biases;
  std::vector<SbmmTask> qkv, o, gate_up, down;
  // Shared, since sequences point into it and contents are copied.
  std::shared_ptr<std::vector<std::vector<std::int32_t>>> tables =
      std::make_shared<std::vector<std::vector<std::int32_t>>>();
  std::vector<AttentionSequence> sequences;
};

struct Result {
  std::vector<float> logits, residual, keys, values;
  bool operator==(const Result& other) const {  // bits: NaN is equal to itself
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() &&
             same_bits(a.data(), b.data(), static_cast<std::int64_t>(a.size()));
    };
    return same(logits, other.logits) && same(residual, other.residual) && same(keys, other.keys) &&
           same(values, other.values);
  }
};

class Layer {
 public:
  Layer(Backend& backend, Stream& stream, std::int64_t num_rows, Rng& rng)
      : backend_(backend),
        stream_(stream),
        num_rows_(num_rows),
        embedding_(backend, stream, kVocab, kHidden, DType::kBFloat16, rng),
        qkv_weight_(backend, stream, kQ + 2 * kKv, kHidden, DType::kBFloat16, rng),
        o_weight_(backend, stream, kHidden, kQ, DType::kBFloat16, rng),
        gate_up_weight_(backend, stream, 2 * kInner, kHidden, DType::kBFloat16, rng),
        down_weight_(backend, stream, kHidden, kInner, DType::kBFloat16, rng),
        variants_{Variant(backend, DeltaType::kSparse24Int4, 64, rng),
                  Variant(backend, DeltaType::kSparse24Ternary, 128, rng)},
        float_vectors_(backend, stream, kFloatRows, kFloatSize, DType::kFloat32),
        angles_(backend, stream, kAngles, kHeadDim, DType::kFloat32) {
    const DType dtype = backend.activation_dtype(DType::kBFloat16);
    const auto make = [&](std::optional<DeviceMatrix>& matrix, std::int64_t columns, DType of) {
      matrix.emplace(backend, stream, num_rows, columns, of);
    };
    make(residual_, kHidden, dtype);
    make(normed_, kHidden, dtype);
    make(block_, kHidden, dtype);
    make(qkv_, kQ + 2 * kKv, dtype);
    make(attended_, kQ, dtype);
    make(gate_up_, 2 * kInner, dtype);
    make(inner_, kInner, dtype);
    make(logits_, kVocab, DType::kFloat32);
    const auto fill = [&](const DeviceMatrix& matrix) {
      const TensorView view = matrix.view();
      const Matrix values = Matrix::random(view.size(0), view.size(1), rng);
      backend.copy_to_device(view.data, values.data(), view.num_bytes(), stream);
      stream.synchronize();
    };
    fill(float_vectors_);
    fill(angles_);
    const KvLayer shape{.num_blocks = kNumBlocks,
                        .num_kv_heads = kKvHeads,
                        .block_size = kBlockSize,
                        .head_dim = kHeadDim,
                        .dtype = dtype};
    const auto size = static_cast<std::int64_t>(num_elements(shape));
    const Matrix keys = Matrix::random(1, size, rng), values = Matrix::random(1, size, rng);
    keys_.assign(keys.data(), keys.data() + size);
    values_.assign(values.data(), values.data() + size);
    cache_.emplace(backend, stream, shape, keys_, values_);
  }

  // Segments of random variants, or of the base alone; sequences of random length; padding.
  Content random_content(Rng& rng, bool is_base = false) const {
    const auto below = [&](std::int64_t bound) {
      return static_cast<std::int32_t>(rng() % static_cast<std::uint64_t>(bound));
    };
    Content content;
    std::vector<std::int32_t> free(kNumBlocks);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), rng);
    const std::int32_t num_real = 1 + below(num_rows_);
    std::array<std::int32_t, kSegments + 1> ends{0, below(num_real + 1), below(num_real + 1),
                                                 num_real};
    std::sort(ends.begin(), ends.end());
    for (std::int32_t row = 0; row < num_rows_; ++row) {
      auto& table = content.tables->emplace_back();
      content.angle_rows.push_back(below(kAngles));
      if (row >= num_real) {  // as the engine pads: nothing is stored, nothing attended
        content.tokens.push_back(0);
        content.cache_slots.push_back(-1);
        content.sequences.push_back({row, 0, 0, nullptr});
        continue;
      }
      const std::int32_t length = 1 + below(4 * kBlockSize);
      for (std::int32_t b = 0; b * kBlockSize < length; ++b) {
        table.push_back(free.back());
        free.pop_back();
      }
      content.tokens.push_back(below(kVocab));
      content.cache_slots.push_back(std::int64_t{table.back()} * kBlockSize +
                                    (length - 1) % kBlockSize);
      content.sequences.push_back({row, 1, length, nullptr});
    }
    for (std::size_t row = 0; row < content.tables->size(); ++row) {
      if (content.sequences[row].num_rows > 0) {
        content.sequences[row].blocks = (*content.tables)[row].data();
      }
    }
    const auto rows = static_cast<std::size_t>(num_rows_);
    content.embeddings.assign(rows, nullptr);
    for (std::vector<const float*>* vectors :
         {&content.first_gains, &content.second_gains, &content.biases}) {
      for (std::size_t row = 0; row < rows; ++row)
        vectors->push_back(float_vector(below(kFloatRows)));
    }
    content.biases[0] = nullptr;
    for (std::size_t s = 0; s < kSegments; ++s) {
      const std::int32_t first = ends[s], count = ends[s + 1] - first;
      const std::size_t chosen = is_base ? variants_.size() : rng() % kVariants;
      const Variant* variant = chosen < variants_.size() ? &variants_[chosen] : nullptr;
      const auto task = [&](const Delta Variant::* matrix, std::int64_t offset) {
        return SbmmTask{variant == nullptr ? DeltaMatrix{} : (variant->*matrix).matrix, first,
                        count, offset};
      };
      content.qkv.push_back(task(&Variant::q, 0));
      content.qkv.push_back(task(&Variant::k, kQ));
      content.qkv.push_back(task(&Variant::v, kQ + kKv));
      content.o.push_back(task(&Variant::o, 0));
      content.gate_up.push_back(task(&Variant::gate_up, 0));
      content.down.push_back(task(&Variant::down, 0));
      for (std::int32_t row = first; row < first + count && variant != nullptr; ++row) {
        content.embeddings[static_cast<std::size_t>(row)] = &variant->embedding.matrix;
      }
    }
    return content;
  }

  // Everything as before any step.
  void reset() {
    for (DeviceMatrix* each :
         {&*residual_, &*normed_, &*block_, &*qkv_, &*attended_, &*gate_up_, &*inner_, &*logits_}) {
      each->poison();
    }
    cache_->upload(keys_, values_);
    // Padded rows of `attended` are never written: like the engine's, they hold old numbers.
    const std::vector<float> zeros(static_cast<std::size_t>(num_rows_ * kQ));
    const std::vector<std::byte> bytes =
        to_bytes(zeros, backend_.activation_dtype(DType::kBFloat16));
    backend_.copy_to_device(attended_->view().data, bytes.data(), bytes.size(), stream_);
    stream_.synchronize();
  }

  // With a pause after every op nothing can overlap that should not.
  void launch(const Content& content, bool pauses) {
    Ops& ops = backend_.ops();
    const auto pause = [&] {
      if (pauses) stream_.synchronize();
    };
    ops.embed(residual_->view(), content.tokens, embedding_.packed, content.embeddings, stream_);
    pause();
    ops.rms_norm(normed_->view(), residual_->view(), {}, content.first_gains, 1e-5F, stream_);
    pause();
    ops.project(qkv_->view(), normed_->view(), qkv_weight_.packed, content.qkv, stream_);
    pause();
    ops.bias_add(qkv_->view(), content.biases, stream_);
    pause();
    ops.rope_append(qkv_->view(), angles_.view(), content.angle_rows, content.cache_slots,
                    cache_->layer(), kHeads, stream_);
    pause();
    ops.paged_attention(attended_->view(), qkv_->view(), cache_->layer(), content.sequences, kHeads,
                        0.125F, stream_);
    pause();
    ops.project(block_->view(), attended_->view(), o_weight_.packed, content.o, stream_);
    pause();
    ops.rms_norm(normed_->view(), residual_->view(), block_->view(), content.second_gains, 1e-5F,
                 stream_);
    pause();
    ops.project(gate_up_->view(), normed_->view(), gate_up_weight_.packed, content.gate_up,
                stream_);
    pause();
    ops.silu_mul(inner_->view(), gate_up_->view(), stream_);
    pause();
    ops.project(block_->view(), inner_->view(), down_weight_.packed, content.down, stream_);
    pause();
    ops.rms_norm(normed_->view(), residual_->view(), block_->view(), content.first_gains, 1e-5F,
                 stream_);
    pause();
    ops.linear(logits_->view(), normed_->view(), embedding_.packed, stream_);
    pause();
  }

  Result result() const {
    stream_.synchronize();
    EXPECT_TRUE(residual_->guards_intact() && logits_->guards_intact() && qkv_->guards_intact() &&
                inner_->guards_intact() && cache_->guards_intact());
    return {logits_->download(), residual_->download(), cache_->keys(), cache_->values()};
  }

 private:
  static constexpr std::int64_t kFloatRows = 12, kFloatSize = kQ + 2 * kKv;
  const float* float_vector(std::int64_t row) const {
    return static_cast<const float*>(float_vectors_.view().data) + row * kFloatSize;
  }

  Backend& backend_;
  Stream& stream_;
  std::int64_t num_rows_;
  Weight embedding_, qkv_weight_, o_weight_, gate_up_weight_, down_weight_;
  std::array<Variant, 2> variants_;
  DeviceMatrix float_vectors_, angles_;
  std::optional<DeviceMatrix> residual_, normed_, block_, qkv_, attended_, gate_up_, inner_,
      logits_;
  std::vector<float> keys_, values_;
  std::optional<KvMemory> cache_;
};

bool is_finite(const std::vector<float>& values) {
  return std::ranges::all_of(values, [](float v) { return std::isfinite(v); });
}

// Recorded steps belong to a backend and its keys, so each test opens one of its own.
class StepTest : public BackendTest {
 protected:
  Result run_eagerly(Layer& layer, const Content& content, bool pauses) {
    layer.reset();
    layer.launch(content, pauses);
    return layer.result();
  }
  Result run_once(Layer& layer, const Content& content) {
    layer.reset();
    opened_.backend->run_once(*opened_.stream, [&] { layer.launch(content, false); });
    return layer.result();
  }
  OpenedBackend opened_{GetParam(), 2};
};
DZ_ON_EVERY_BACKEND(StepTest);

TEST_P(StepTest, OpsInARowGiveWhatTheyGiveOneByOne) {
  for (const std::int64_t num_rows : {1, 8, 24}) {
    Layer layer(*opened_.backend, *opened_.stream, num_rows, rng_);
    for (int round = 0; round < 5; ++round) {
      const Content content = layer.random_content(rng_);
      const Result one_by_one = run_eagerly(layer, content, true);
      EXPECT_TRUE(is_finite(one_by_one.logits)) << num_rows << " rows";
      EXPECT_EQ(run_eagerly(layer, content, false), one_by_one) << num_rows << " rows";
      EXPECT_EQ(run_eagerly(layer, content, false), one_by_one) << num_rows << " rows, again";
      EXPECT_EQ(run_once(layer, content), one_by_one) << num_rows << " rows, run once";
    }
  }
}

TEST_P(StepTest, AReplayedStepHasItsOwnContents) {
  std::vector<std::unique_ptr<Layer>> layers;
  for (const std::int64_t num_rows : {4, 8}) {
    layers.push_back(std::make_unique<Layer>(*opened_.backend, *opened_.stream, num_rows, rng_));
  }
  std::vector<Content> kept;  // of round 0: a step may come again, word for word
  for (int round = 0; round < 8; ++round) {
    for (std::size_t i = 0; i < layers.size(); ++i) {
      Layer& layer = *layers[i];
      const Content content = round == 5 ? kept[i] : layer.random_content(rng_, round == 3);
      if (round == 0) kept.push_back(content);
      const Result expected = run_eagerly(layer, content, true);
      layer.reset();
      opened_.backend->run_step({static_cast<std::int32_t>(i), 1, 2, 3}, *opened_.stream,
                                [&] { layer.launch(content, false); });
      EXPECT_EQ(layer.result(), expected) << "round " << round << " of shape " << i;
    }
  }
}

// The next step is given before the last is waited for: what each was told is its own, also when
// the host's arrays are gone.
TEST_P(StepTest, StepsBehindOneAnotherHaveTheirOwnContents) {
  constexpr std::size_t kNumSteps = 5;
  Layer layer(*opened_.backend, *opened_.stream, 8, rng_);
  const std::array<std::unique_ptr<Event>, 2> events{opened_.backend->create_event(),
                                                     opened_.backend->create_event()};
  for (int round = 0; round < 6; ++round) {
    std::vector<Content> contents;
    layer.reset();
    for (std::size_t i = 0; i < kNumSteps; ++i) {
      contents.push_back(layer.random_content(rng_));
      layer.launch(contents.back(), true);
    }
    const Result expected = layer.result();
    layer.reset();
    for (std::size_t i = 0; i < kNumSteps; ++i) {
      const auto content = std::make_unique<Content>(contents[i]);
      if ((static_cast<std::size_t>(round) + i) % 4 == 0) {  // as a prefill among decodes
        opened_.backend->run_once(*opened_.stream, [&] { layer.launch(*content, false); });
      } else if ((static_cast<std::size_t>(round) + i) % 4 == 1) {
        layer.launch(*content, false);
      } else {
        opened_.backend->run_step({9, 9, 9, 9}, *opened_.stream,
                                  [&] { layer.launch(*content, false); });
      }
      events[i % 2]->record(*opened_.stream);
      if (i > 0) events[(i - 1) % 2]->synchronize();
    }
    EXPECT_EQ(layer.result(), expected) << "round " << round;
  }
}

// A refused step, the first of its key, one to be recorded or one to be replayed, leaves the next
// ones alone.
TEST_P(StepTest, AFailedStepIsForgotten) {
  Layer layer(*opened_.backend, *opened_.stream, 4, rng_);
  for (std::int32_t num_before = 0; num_before < 4; ++num_before) {
    const StepKey key{7, 7, 7, num_before};
    for (std::int32_t round = 0; round < num_before + 3; ++round) {
      const Content content = layer.random_content(rng_);
      if (round == num_before) {
        Content wrong = content;
        wrong.second_gains.pop_back();
        layer.reset();
        EXPECT_THROW(
            opened_.backend->run_step(key, *opened_.stream, [&] { layer.launch(wrong, false); }),
            InvalidArgument);
        EXPECT_THROW(
            opened_.backend->run_once(*opened_.stream, [&] { layer.launch(wrong, false); }),
            InvalidArgument);
        opened_.stream->synchronize();
      }
      const Result expected = run_eagerly(layer, content, true);
      layer.reset();
      opened_.backend->run_step(key, *opened_.stream, [&] { layer.launch(content, false); });
      EXPECT_EQ(layer.result(), expected)
          << "round " << round << ", failed after " << num_before << " steps";
      EXPECT_EQ(run_once(layer, content), expected) << "round " << round << ", run once";
    }
  }
}

TEST_P(StepTest, PaddedRowsAreAtLeastTheRowsAndFew) {
  std::int32_t last = 0, num_buckets = 0;
  for (std::int32_t rows = 1; rows <= 512; ++rows) {
    const std::int32_t padded = backend().padded_rows(rows);
    if (padded == 0) continue;
    EXPECT_GE(padded, rows);
    EXPECT_GE(padded, last) << "more rows are never padded to fewer";
    EXPECT_EQ(backend().padded_rows(padded), padded);
    if (padded != last) ++num_buckets;
    last = padded;
  }
  EXPECT_LE(num_buckets, 40);
  EXPECT_EQ(backend().padded_rows(0), 0);
}

}  // namespace
}  // namespace deltazip::testing
