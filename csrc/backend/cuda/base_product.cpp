#include "backend/cuda/base_product.h"

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/measure.h"

namespace deltazip::cuda {
namespace {

// Out features that counters are kept for; a larger head goes to cuBLASLt.
constexpr std::int64_t kMaxOutFeatures = std::int64_t{1} << 20;

// Alone, a streamed product does not show what it gains in a step, where its weights are fetched
// while the kernel before it ends.
constexpr float kStreamBonus = 1.1F;
constexpr int kRepetitions = 5;

std::int64_t bucket(std::int64_t num_tokens) {
  for (const std::int64_t tokens : {8, 16, 32, 64, 96}) {
    if (num_tokens <= tokens) return tokens;
  }
  return base_gemm::kMaxTokens;
}

}  // namespace

BaseProduct::BaseProduct(int num_sms, int compute_capability)
    : num_sms_(num_sms),
      compute_capability_(compute_capability),
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
          num_sms_};
}

bool BaseProduct::streams(const LtProduct& product) const {
  return compute_capability_ >= 90 && product.y_stride == product.out_features &&
         product.out_features <= kMaxOutFeatures && stream_gemm_takes(stream_params(product));
}

bool BaseProduct::prefers_stream(const LtProduct& product, bool may_measure, cudaStream_t stream) {
  const Key key{bucket(product.num_tokens), product.in_features, product.out_features,
                product.y_dtype};
  const auto known = prefers_stream_.find(key);
  if (known != prefers_stream_.end()) return known->second;
  if (!may_measure) return true;
  bool prefers = true;
  if (lt_.run(product, LtChoice::kMeasure, stream)) {
    const auto time = [&](auto&& launch) {
      launch();
      return least_ms(launch, kRepetitions, lt_.workspace(), lt_.workspace_bytes(), stream);
    };
    const float lt_ms = time([&] { lt_.run(product, LtChoice::kFirst, stream); });
    const float stream_ms = time([&] { launch_stream_gemm(stream_params(product), stream); });
    prefers = stream_ms < kStreamBonus * lt_ms;
  }
  prefers_stream_.emplace(key, prefers);
  return prefers;
}

void BaseProduct::run(const LtProduct& product, bool may_measure, cudaStream_t stream) {
  if (streams(product) && prefers_stream(product, may_measure, stream)) {
    return launch_stream_gemm(stream_params(product), stream);
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
