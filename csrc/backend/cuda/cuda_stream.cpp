#include "backend/cuda/cuda_stream.h"

#include "backend/cuda/cuda_check.h"

namespace deltazip::cuda {

CudaStream::CudaStream(int device) : device_(device) {
  use_device(device);
  DZ_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
}

CudaStream::~CudaStream() { cudaStreamDestroy(stream_); }

void CudaStream::synchronize() {
  use_device(device_);
  DZ_CUDA(cudaStreamSynchronize(stream_));
  passed(marks_);
}

void CudaStream::passed(std::int64_t mark) {
  while (!calls_.empty() && calls_.front().first <= mark) {
    const std::function<void()> call = std::move(calls_.front().second);
    calls_.pop_front();
    call();
  }
}

CudaStream& to_cuda(Stream& stream) {
  auto& cuda_stream = dynamic_cast<CudaStream&>(stream);
  use_device(cuda_stream.device());
  return cuda_stream;
}

}  // namespace deltazip::cuda
