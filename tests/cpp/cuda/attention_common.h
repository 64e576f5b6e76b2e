#pragma once

// What the attention programs share: device memory that frees itself, the shape of a batch.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/kernels/paged_attention/plan.h"

namespace deltazip::cuda {

using Rng = std::mt19937_64;

template <typename T>
std::size_t to_size(T value) {
  return static_cast<std::size_t>(value);
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : count_(count) {
    void* memory = nullptr;
    DZ_CUDA(cudaMalloc(&memory, std::max<std::size_t>(count, 1) * sizeof(T)));
    data_ = static_cast<T*>(memory);
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { write(host); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() const { return data_; }
  std::size_t size() const { return count_; }
  void write(const std::vector<T>& host) {
    DZ_CUDA(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    DZ_CUDA(cudaDeviceSynchronize());  // a copy from pageable memory may return before it is done
  }
  void fill_bytes(int byte) {
    DZ_CUDA(cudaMemset(data_, byte, count_ * sizeof(T)));
    DZ_CUDA(cudaDeviceSynchronize());  // the kernels' stream does not wait for this one
  }
  std::vector<T> read() const {
    std::vector<T> host(count_);
    DZ_CUDA(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  T* data_;
  std::size_t count_;
};

struct Heads {
  std::int32_t num_heads, num_kv_heads, head_dim, block_size;
};

struct Length {
  std::int32_t num_rows, context_length;
};

inline int device_sms() {
  int count = 0;
  DZ_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

struct Scratch {
  Scratch(std::int64_t num_sequences, const Heads& heads)
      : size(attention_scratch_size(num_sequences, heads.num_heads, heads.head_dim)),
        sums(size.partial_rows * to_size(heads.head_dim)),
        softmax(size.partial_rows * 2),
        counters(size.counters) {
    counters.fill_bytes(0);
    sums.fill_bytes(0xFF);
    softmax.fill_bytes(0xFF);
  }
  AttentionScratchSize size;
  DeviceArray<float> sums, softmax;
  DeviceArray<std::uint32_t> counters;
};

// Prints a table of times and rates.
void time_attention();

}  // namespace deltazip::cuda
