#pragma once

// What the checks of the row-wise kernels and of sampling share: device arrays between poisoned
// guards, and timing of a launch within a recorded graph.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backend/cuda/cuda_check.h"
#include "deltazip/base/dtype.h"

namespace deltazip::cuda::check {

using Rng = std::mt19937_64;

// Device memory with 256 bytes of NaN before and after it.
class Memory {
 public:
  explicit Memory(std::size_t num_bytes, int fill = 0xFF) : num_bytes_(num_bytes) {
    DZ_CUDA(cudaMalloc(&data_, num_bytes + 2 * kGuard));
    DZ_CUDA(cudaMemset(data_, 0xFF, num_bytes + 2 * kGuard));
    DZ_CUDA(cudaMemset(get(), fill, num_bytes));
    DZ_CUDA(cudaDeviceSynchronize());  // kernels run in a stream that does not wait for this one
  }
  template <typename T>
  explicit Memory(const std::vector<T>& host) : Memory(host.size() * sizeof(T)) {
    DZ_CUDA(cudaMemcpy(get(), host.data(), num_bytes_, cudaMemcpyHostToDevice));
    DZ_CUDA(cudaDeviceSynchronize());  // from pageable memory it may return before it is done
  }
  Memory(Memory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), num_bytes_(other.num_bytes_) {}
  ~Memory() { cudaFree(data_); }

  template <typename T = void>
  T* get() const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + kGuard);
  }
  template <typename T>
  std::vector<T> read() const {
    std::vector<T> host(num_bytes_ / sizeof(T));
    DZ_CUDA(cudaMemcpy(host.data(), get(), host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  bool guards_intact() const {
    std::vector<unsigned char> bytes(num_bytes_ + 2 * kGuard);
    DZ_CUDA(cudaMemcpy(bytes.data(), data_, bytes.size(), cudaMemcpyDeviceToHost));
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (bytes[i] != 0xFF || bytes[kGuard + num_bytes_ + i] != 0xFF) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 256;
  void* data_ = nullptr;
  std::size_t num_bytes_;
};

inline std::uint16_t round_to(DType dtype, float value) {
  return dtype == DType::kFloat16 ? to_half(value).bits : to_bfloat16(value).bits;
}
inline float widen(DType dtype, std::uint16_t bits) {
  return dtype == DType::kFloat16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
}
inline std::vector<float> widen(DType dtype, const std::vector<std::uint16_t>& words) {
  std::vector<float> floats;
  floats.reserve(words.size());
  for (const std::uint16_t word : words) floats.push_back(widen(dtype, word));
  return floats;
}
inline std::vector<std::uint16_t> random_words(std::size_t count, DType dtype, float scale,
                                               Rng& rng) {
  std::normal_distribution<float> normal(0.0F, scale);
  std::vector<std::uint16_t> words(count);
  for (std::uint16_t& word : words) word = round_to(dtype, normal(rng));
  return words;
}
inline std::vector<float> random_floats(std::size_t count, float scale, Rng& rng) {
  std::normal_distribution<float> normal(0.0F, scale);
  std::vector<float> floats(count);
  for (float& value : floats) value = normal(rng);
  return floats;
}

// Counts what fails, and says so.
class Report {
 public:
  void expect(bool holds, const std::string& what) {
    ++num_checks_;
    if (holds) return;
    if (++num_failures_ <= 20) std::printf("FAILED %s\n", what.c_str());
  }
  int num_checks() const { return num_checks_; }
  int num_failures() const { return num_failures_; }

 private:
  int num_checks_ = 0, num_failures_ = 0;
};

// Microseconds of one launch among 200 in a graph, the best of 5 runs.
double time_in_graph(cudaStream_t stream, const std::function<void()>& launch);

void check_rowwise(Report& report, cudaStream_t stream);
void check_sampling(Report& report, cudaStream_t stream);
void time_rowwise(cudaStream_t stream);
void time_sampling(cudaStream_t stream);

}  // namespace deltazip::cuda::check
