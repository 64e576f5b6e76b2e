#pragma once

// Random deltas for checking and timing SBMM on a device.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string_view>
#include <vector>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/kernels/sbmm/fixed_point.h"
#include "backend/cuda/kernels/sbmm/plan.h"
#include "backend/cuda/kernels/sbmm/sbmm.h"
#include "backend/cuda/kernels/sbmm/tiling.h"
#include "deltazip/base/dtype.h"

namespace deltazip::bench {

// Device memory, freed at the end; poisoned with 0xFF (NaN in every float type) at the start.
class DeviceBytes {
 public:
  explicit DeviceBytes(std::size_t num_bytes) : num_bytes_(num_bytes) {
    DZ_CUDA(cudaMalloc(&data_, num_bytes > 0 ? num_bytes : 1));
    poison();
  }
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(DeviceBytes&& other) noexcept : data_(other.data_), num_bytes_(other.num_bytes_) {
    other.data_ = nullptr;
  }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  void poison() { DZ_CUDA(cudaMemset(data_, 0xFF, num_bytes_)); }
  template <typename T>
  void upload(const std::vector<T>& host) {
    DZ_CUDA(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  template <typename T>
  std::vector<T> download(std::size_t count) const {
    std::vector<T> host(count);
    DZ_CUDA(cudaMemcpy(host.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t num_bytes_;
};

// A random delta in the file's layout, and what it means.
struct RandomDelta {
  RandomDelta(DeltaType type, std::int64_t rows, std::int64_t columns, std::int32_t group_size,
              std::mt19937_64& rng, bool with_dense = true);
  DeltaSource source() const;
  std::vector<std::uint8_t> tile() const;

  DeltaType type;
  std::int64_t rows, columns;
  std::int32_t group_size;
  std::vector<std::uint8_t> values, indices;
  std::vector<std::uint16_t> scales;
  std::vector<float> dense;  // [rows, columns]
};

// A float's 16 bits, and back.
std::uint16_t to_bits(float value, DType dtype);
float from_bits(std::uint16_t bits, DType dtype);

// x [rows, columns] in fixed point, made on the device and checked there and then: its bytes are
// the host's, and mean x to within half a unit. How many do not is added to `num_wrong`. Afterwards
// `x` is what the bytes mean, so that SBMM can be held to its own rounding.
DeviceBytes fixed_point(const DeviceBytes& x_device, std::int64_t columns, DType dtype,
                        std::vector<float>& x, std::size_t& num_wrong);
// Zeros, infinities, NaN, the least and the largest: how many are not what they should be.
int check_fixed_point();

// Only cases whose name contains `filter`.
int verify_sbmm(std::string_view filter);
enum class TimedCases { kAll, kAnchors, kBytes, kChains };
void time_sbmm(TimedCases cases);
// TB/s of bulk copies of 12.8 KB into shared memory over 4 GB.
double read_bandwidth();
// out[m, n] = sum over k of x[m, k] * w[n, k] in double.
void reference_product(double* out, const float* x, const float* w, int m, int n, int k);

}  // namespace deltazip::bench
