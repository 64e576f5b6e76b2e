#include "backend/cuda/cuda_check.h"

namespace deltazip::cuda {

void fail_cuda(cudaError_t error, const char* what) {
  cudaGetLastError();  // an error that is not sticky must not meet the next caller
  const auto text = detail::concat("cuda: ", what, ": ", cudaGetErrorName(error), ": ",
                                   cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) throw ResourceExhausted(text);
  throw InternalError(text);
}

void use_device(int device) {
  int current = -1;
  // Asked for before every op: reading is much cheaper than setting.
  if (cudaGetDevice(&current) != cudaSuccess || current != device) DZ_CUDA(cudaSetDevice(device));
}

}  // namespace deltazip::cuda
