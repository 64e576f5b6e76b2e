#pragma once

#include "backend/cuda/kernels/sbmm/sbmm.h"

namespace deltazip::cuda {

// The kernel for each dtype of x, compiled apart.
using SbmmKernel = void (*)(SbmmLaunch);
SbmmKernel sbmm_kernel_half();
SbmmKernel sbmm_kernel_bfloat16();

}  // namespace deltazip::cuda
