#pragma once

// Host side of a kernel launch.

#include <cuda_runtime.h>

#include <cstddef>

#include "backend/cuda/cuda_check.h"

namespace deltazip::cuda {

struct LaunchShape {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
};

// Launches with programmatic stream serialisation: the kernel may begin while the one before it
// still runs, and must call griddep_wait() (pdl.cuh) before it touches anything of the stream's.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
            const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  DZ_CUDA(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

// More than 48 KB of shared memory is given only to a kernel that has asked. Once per kernel and
// device; cheap enough to call before every launch outside of graphs.
template <typename... Params>
void allow_shared_memory(void (*kernel)(Params...), std::size_t num_bytes) {
  if (num_bytes <= 48 * 1024) return;
  DZ_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(num_bytes)));
}

}  // namespace deltazip::cuda
