#include "backend/cuda/base_product.h"

#include <algorithm>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/measure.h"

namespace deltazip::cuda {
namespace {

// Out features that counters are kept for; a larger head goes to cuBLASLt.
constexpr std::int64_t kMaxOutFeatures = std::int64_t{1} << 20;

// In a step row-wise kernels stand between the products, which a streamed product overlaps and the
// library's does not: 64 rows, in a row 5.30 ms against 5.08, with such kernels 5.37 against 5.71.
// Single shapes lose up to 15 % in a row; one of the library's among them would break the overlap.
constexpr float kStreamBonus = 1.2F;
constexpr int kRepetitions = 4;

// A chain to be measured: its weights are more than L2 holds.
constexpr std::size_t kChainBytes = std::size_t{128} << 20;
constexpr std::size_t kMinChain = 8, kMaxChain = 32;

std::int64_t bucket(std::int64_t num_tokens) {
  return num_tokens <= 8 ? 8 : num_tokens <= 16 ? 16 : num_tokens <= 32 ? 32 : 64;
}

static_assert(BaseProduct::kMaxStreamTokens <= base_gemm::kMaxTokens);

}  // namespace

BaseProduct::BaseProduct(int num_sms, std::span<const std::byte> spare)
    : num_sms_(num_sms),
      spare_(spare),
      partials_(stream_gemm_partials_bytes(num_sms)),
      counters_(stream_gemm_counters_bytes(kMaxOutFeatures)) {
  DZ_CUDA(cudaMemset(counters_.data(), 0, counters_.num_bytes()));
  DZ_CUDA(cudaDeviceSynchronize());
}

StreamGemm BaseProduct::stream_params(const LtProduct& p) const {
  return {p.x,
          p.weight,
          p.y,
          static_cast<float*>(partials_.data()),
          static_cast<std::uint32_t*>(counters_.data()),
          p.num_tokens,
          p.in_features,
          p.out_features,
          p.dtype,
          p.y_dtype,
          num_sms_,
          is_wide_turn_ ? base_gemm::Form::kWide : base_gemm::Form::kDeep};
}

void BaseProduct::launch_stream(const LtProduct& product, cudaStream_t stream) {
  launch_stream_gemm(stream_params(product), stream);
  is_wide_turn_ = !is_wide_turn_;
}

bool BaseProduct::streams(const LtProduct& product) const {
  return product.num_tokens <= kMaxStreamTokens && product.y_stride == product.out_features &&
         product.out_features <= kMaxOutFeatures && stream_gemm_takes(stream_params(product));
}

template <typename F>
float BaseProduct::chain_ms(const LtProduct& product, F&& launch, cudaStream_t stream) const {
  const std::size_t pitch =
      (static_cast<std::size_t>(product.in_features * product.out_features) * 2 + 255) / 256 * 256;
  const std::size_t length = std::clamp(kChainBytes / pitch, kMinChain, kMaxChain);
  const std::size_t places = spare_.size() / pitch;
  const auto chain = [&] {
    for (std::size_t i = 0; i < length; ++i) {
      LtProduct p = product;
      if (places > 1) p.weight = spare_.data() + i % places * pitch;
      launch(p);
    }
  };
  chain();
  return least_ms(chain, kRepetitions, lt_.workspace(), lt_.workspace_bytes(), stream);
}

bool BaseProduct::prefers_stream(const LtProduct& product, bool may_measure, cudaStream_t stream) {
  const Key key{bucket(product.num_tokens), product.in_features, product.out_features,
                product.y_dtype};
  const auto known = prefers_stream_.find(key);
  if (known != prefers_stream_.end()) return known->second;
  if (!may_measure) return true;
  bool prefers = true;
  if (lt_.run(product, LtChoice::kMeasure, stream)) {
    const float lt_ms = chain_ms(
        product, [&](const LtProduct& p) { lt_.run(p, LtChoice::kFirst, stream); }, stream);
    const float stream_ms =
        chain_ms(product, [&](const LtProduct& p) { launch_stream(p, stream); }, stream);
    prefers = stream_ms < kStreamBonus * lt_ms;
  }
  prefers_stream_.emplace(key, prefers);
  return prefers;
}

void BaseProduct::run(const LtProduct& product, bool may_measure, cudaStream_t stream) {
  if (streams(product) && prefers_stream(product, may_measure, stream)) {
    return launch_stream(product, stream);
  }
  if (lt_.run(product, may_measure ? LtChoice::kMeasure : LtChoice::kFirst, stream)) return;
  launch_plain_gemm({product.x, product.weight, product.y, product.num_tokens, product.in_features,
                     product.out_features, product.y_stride, product.dtype, product.y_dtype},
                    stream);
}

std::size_t BaseProduct::workspace_bytes() const {
  return lt_.workspace_bytes() + partials_.num_bytes() + counters_.num_bytes();
}

}  // namespace deltazip::cuda
