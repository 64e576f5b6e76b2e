#include "backend/cuda/kernels/device/launch.h"
#include "backend/cuda/kernels/sbmm/config.h"
#include "backend/cuda/kernels/sbmm/kernel.cuh"

namespace deltazip::cuda {

void launch_sbmm(const SbmmLaunch& params, cudaStream_t stream) {
  allow_shared_memory(sbmm_kernel, kSharedBytes);
  DZ_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(sbmm_kernel),
                               cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared));
  launch(sbmm_kernel,
         {dim3(static_cast<unsigned>(params.num_ctas)), dim3(kSbmmThreads), kSharedBytes}, stream,
         params);
}

}  // namespace deltazip::cuda
