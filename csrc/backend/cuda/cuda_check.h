#pragma once

#include <cuda_runtime_api.h>

#include "deltazip/base/error.h"

namespace deltazip::cuda {

[[noreturn]] void fail_cuda(cudaError_t error, const char* what);

// Throws ResourceExhausted when the device is out of memory, else InternalError, with CUDA's words.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) [[unlikely]]
    fail_cuda(error, what);
}

// Makes `device` the calling thread's: CUDA keeps that per thread, we keep it nowhere.
void use_device(int device);

}  // namespace deltazip::cuda

#define DZ_CUDA(call) ::deltazip::cuda::check_cuda((call), #call)
