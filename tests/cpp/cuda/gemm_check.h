#pragma once

// What the checks and the timings of the base products share.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "backend/cuda/cublaslt.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/kernels/base_gemm/base_gemm.h"

namespace deltazip::cuda::check {

// Device memory of one owner.
class Memory {
 public:
  explicit Memory(std::size_t num_bytes) : num_bytes_(num_bytes) {
    DZ_CUDA(cudaMalloc(&data_, num_bytes));
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <typename T = void>
  T* get(std::size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + byte_offset);
  }
  std::size_t num_bytes() const { return num_bytes_; }
  // Done when it returns: the stream of the kernels does not wait for the one that this uses.
  void set(int byte) const {
    DZ_CUDA(cudaMemset(data_, byte, num_bytes_));
    DZ_CUDA(cudaDeviceSynchronize());
  }

 private:
  void* data_ = nullptr;
  std::size_t num_bytes_;
};

// Scratch of the stream kernel: poisoned sums, zero counters.
struct Scratch {
  explicit Scratch(int num_sms_in)
      : num_sms(num_sms_in),
        partials(stream_gemm_partials_bytes(num_sms)),
        counters(stream_gemm_counters_bytes(1 << 18)) {
    partials.set(0xFF);
    counters.set(0);
  }
  int num_sms;
  Memory partials, counters;
};

struct Shape {
  std::int64_t in, out;
};

inline StreamGemm stream_params(const Scratch& scratch, const void* x, const void* weight, void* y,
                                std::int64_t num_tokens, Shape shape, DType dtype, DType y_dtype,
                                base_gemm::Form form = base_gemm::Form::kDeep) {
  return {x,
          weight,
          y,
          scratch.partials.get<float>(),
          scratch.counters.get<std::uint32_t>(),
          num_tokens,
          shape.in,
          shape.out,
          dtype,
          y_dtype,
          scratch.num_sms,
          form};
}

// Products in a row take turns.
inline base_gemm::Form form_of(std::size_t index) {
  return index % 2 == 0 ? base_gemm::Form::kDeep : base_gemm::Form::kWide;
}

// Uniform 16-bit numbers of the given root mean square, the same for a seed everywhere.
void fill(void* data, std::size_t count, DType dtype, float rms, std::uint32_t seed,
          cudaStream_t stream);

int check_products(const Scratch& scratch, CublasLt& lt, cudaStream_t stream);  // failures
void time_products(const Scratch& scratch, CublasLt& lt, cudaStream_t stream);
// From how many rows on a segment is worth a weight of its own.
void time_merges(CublasLt& lt, int num_sms, cudaStream_t stream);

// Median microseconds of a graph of what `body` launches.
double graph_us(const std::function<void()>& body, cudaStream_t stream, int repetitions = 7);

}  // namespace deltazip::cuda::check
