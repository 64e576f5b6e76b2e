#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "deltazip/base/dtype.h"

namespace deltazip::cuda {

// y = x * weight^T by the library.
struct LtProduct {
  const void* x;       // [num_tokens, in_features]
  const void* weight;  // [out_features, in_features]
  void* y;             // [num_tokens, out_features], rows y_stride elements apart
  std::int64_t num_tokens, in_features, out_features;
  std::int64_t y_stride;
  DType dtype;    // of x and weight: kFloat16 or kBFloat16
  DType y_dtype;  // dtype, or kFloat32
};

// Whether an algorithm may be chosen by running all candidates now, on the operands themselves.
// Not while a stream is captured: then it is what is known, or the library's own first choice.
enum class LtChoice : std::uint8_t { kMeasure, kFirst };

// cuBLASLt, opened at run time: nothing links it. The choice of an algorithm is kept for each
// shape and bucket of rows, and measured once, by the first product that nearly fills its bucket;
// until then it is the library's first choice. Workspace is taken once. Engine thread.
class CublasLt {
 public:
  // The most rows of x that share an algorithm with num_tokens.
  static std::int64_t bucket(std::int64_t num_tokens);

  // Throws InvalidArgument naming all places searched when the library is not found.
  CublasLt();
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  // False: the library has no algorithm for this shape and alignment, nothing was launched.
  bool run(const LtProduct& product, LtChoice choice, cudaStream_t stream);
  // Between calls anyone on the same stream may write here: as big as L2, to empty it.
  void* workspace() const;
  std::size_t workspace_bytes() const;
  std::string description() const;  // "cuBLASLt 130100"

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltazip::cuda
