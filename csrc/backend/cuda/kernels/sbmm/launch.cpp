#include "backend/cuda/kernels/device/launch.h"

#include "backend/cuda/kernels/sbmm/config.h"
#include "backend/cuda/kernels/sbmm/instances.h"

namespace deltazip::cuda {

void launch_sbmm(const SbmmLaunch& params, cudaStream_t stream) {
  const auto kernel = params.dtype == DType::kFloat16 ? sbmm_kernel_half() : sbmm_kernel_bfloat16();
  allow_shared_memory(kernel, kSharedBytes);
  DZ_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared));
  launch(kernel, {dim3(static_cast<unsigned>(params.num_ctas)), dim3(kSbmmThreads), kSharedBytes},
         stream, params);
}

}  // namespace deltazip::cuda
