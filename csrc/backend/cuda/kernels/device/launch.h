#pragma once

// Host side of a kernel launch.

#include <cuda_runtime.h>

#include <cstddef>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/kernels/device/probe.h"

namespace deltazip::cuda {

struct LaunchShape {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  int cluster_size = 1;  // of CTAs, along x; beyond 1 only for Hopper's code
};

// Launches with programmatic stream serialisation: the kernel may begin while the one before it
// still runs, and must call griddep_wait() (pdl.cuh) before it touches anything of the stream's.
// Code for older devices cannot wait, so there kernels follow each other in full.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
            const Args&... args) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned num_attributes = 0;
  if (runs_hopper_code()) {
    cudaLaunchAttribute& dependent = attributes[num_attributes++];
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster_size > 1) {
    cudaLaunchAttribute& cluster = attributes[num_attributes++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster_size), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
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
