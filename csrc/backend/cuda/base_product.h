#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <tuple>

#include "backend/cuda/cublaslt.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/kernels/base_gemm/base_gemm.h"

namespace deltazip::cuda {

// y = x * weight^T by the fastest of three ways: weights streamed for few rows, cuBLASLt, and a
// plain kernel for what neither takes. Engine thread.
class BaseProduct {
 public:
  // More rows are never given to stream_gemm, which reads weights before it waits for the kernel
  // before it.
  static constexpr std::int64_t kMaxStreamTokens = 64;

  // spare: memory for measuring on, whose content and other use do not matter.
  BaseProduct(int num_sms, std::span<const std::byte> spare);

  // may_measure: a shape that comes for the first time is tried in all ways, which waits for the
  // stream; else the first guess is taken and not remembered.
  void run(const LtProduct& product, bool may_measure, cudaStream_t stream);
  std::size_t workspace_bytes() const;

 private:
  // Rows of x (their bucket), in and out features, y's dtype.
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, DType>;

  bool streams(const LtProduct& product) const;  // whether stream_gemm may be asked
  // Time of several products in a row, each launched dependently on the one before, as in a step;
  // alone, a product does not show what it gains by reading weights while the last one ends.
  template <typename F>
  float chain_ms(const LtProduct& product, F&& launch, cudaStream_t stream) const;
  bool prefers_stream(const LtProduct& product, bool may_measure, cudaStream_t stream);
  StreamGemm stream_params(const LtProduct& product) const;
  void launch_stream(const LtProduct& product, cudaStream_t stream);

  int num_sms_;
  std::span<const std::byte> spare_;
  CublasLt lt_;
  DeviceMemory partials_, counters_;
  std::map<Key, bool> prefers_stream_;
  bool is_wide_turn_ = false;  // the next streamed product's form
};

}  // namespace deltazip::cuda
