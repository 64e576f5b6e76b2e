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
  for (const std::function<void()>& call : std::exchange(calls_, {})) call();
}

CudaStream& to_cuda(Stream& stream) {
  auto& cuda_stream = dynamic_cast<CudaStream&>(stream);
  use_device(cuda_stream.device());
  return cuda_stream;
}

}  // namespace deltazip::cuda
