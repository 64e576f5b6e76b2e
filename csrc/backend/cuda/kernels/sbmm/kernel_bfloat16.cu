#include "backend/cuda/kernels/sbmm/instances.h"
#include "backend/cuda/kernels/sbmm/kernel.cuh"

namespace deltazip::cuda {

SbmmKernel sbmm_kernel_bfloat16() { return sbmm_kernel<__nv_bfloat16>; }

}  // namespace deltazip::cuda
