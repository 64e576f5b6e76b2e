#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>

#include "backend/cuda/cublaslt.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/kernels/base_gemm/base_gemm.h"

namespace deltazip::cuda {

// y = x * weight^T by the fastest of three ways: weights streamed for few rows, cuBLASLt, and a
// plain kernel for what neither takes. Engine thread.
class BaseProduct {
 public:
  BaseProduct(int num_sms, int compute_capability);

  // may_measure: a shape that comes for the first time is tried in all ways, which waits for the
  // stream; else the first guess is taken and not remembered.
  void run(const LtProduct& product, bool may_measure, cudaStream_t stream);
  std::size_t workspace_bytes() const;

 private:
  // Rows of x (their bucket), in and out features, y's dtype.
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, DType>;

  bool streams(const LtProduct& product) const;  // whether stream_gemm may be asked
  bool prefers_stream(const LtProduct& product, bool may_measure, cudaStream_t stream);
  StreamGemm stream_params(const LtProduct& product) const;

  int num_sms_, compute_capability_;
  CublasLt lt_;
  DeviceMemory partials_, counters_;
  std::map<Key, bool> prefers_stream_;
};

}  // namespace deltazip::cuda
