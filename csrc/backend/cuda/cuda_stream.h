#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <utility>

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
  // Called once, by who waits for the stream or for a later mark: unpacks what came back.
  void when_passed(std::function<void()> call) { calls_.emplace_back(marks_, std::move(call)); }
  // Marks count the events recorded: what is queued until the next one belongs to mark().
  std::int64_t mark() const { return marks_; }
  std::int64_t set_mark() { return marks_++; }
  void passed(std::int64_t mark);  // the host has waited for it

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
  std::int64_t marks_ = 0;
  std::deque<std::pair<std::int64_t, std::function<void()>>> calls_;  // by mark, ascending
};

// Makes the stream's device the calling thread's, since work for it follows: allocations and
// kernel attributes go to the current device, whatever stream is meant.
CudaStream& to_cuda(Stream& stream);

}  // namespace deltazip::cuda
