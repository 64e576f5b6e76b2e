#include <cuda_runtime.h>

#include "backend/cuda/kernels/device/probe.h"

namespace deltazip::cuda {
namespace {

__global__ void probe() {}

}  // namespace

bool has_kernels() {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  cudaGetLastError();
  return error == cudaSuccess;
}

}  // namespace deltazip::cuda
