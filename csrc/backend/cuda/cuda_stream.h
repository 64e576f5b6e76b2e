#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <utility>
#include <vector>

#include "deltazip/backend/backend.h"

namespace deltazip::cuda {

class CudaStream final : public Stream {
 public:
  explicit CudaStream(int device);
  ~CudaStream() override;
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  void synchronize() override;
  cudaStream_t get() const { return stream_; }
  int device() const { return device_; }
  // Called by synchronize(), once, after the stream has passed: unpacks what came back.
  void when_passed(std::function<void()> call) { calls_.push_back(std::move(call)); }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
  std::vector<std::function<void()>> calls_;
};

// Makes the stream's device the calling thread's, since work for it follows: allocations and
// kernel attributes go to the current device, whatever stream is meant.
CudaStream& to_cuda(Stream& stream);

}  // namespace deltazip::cuda
