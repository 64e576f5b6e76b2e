#include "backend/cuda/kernels/sbmm/instances.h"
#include "backend/cuda/kernels/sbmm/kernel.cuh"

namespace deltazip::cuda {

SbmmKernel sbmm_kernel_half() { return sbmm_kernel<__half>; }

}  // namespace deltazip::cuda
