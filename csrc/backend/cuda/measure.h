#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <limits>

#include "backend/cuda/cuda_check.h"

namespace deltazip::cuda {

// The least time in ms of several runs of `launch`, each after `scratch` was overwritten: as big as
// L2, it leaves nothing of the operands there, as in a step. Waits for the stream.
template <typename F>
float least_ms(F&& launch, int repetitions, void* scratch, std::size_t scratch_bytes,
               cudaStream_t stream) {
  struct Events {
    Events() {
      DZ_CUDA(cudaEventCreate(&begin));
      DZ_CUDA(cudaEventCreate(&end));
    }
    ~Events() {
      cudaEventDestroy(begin);
      cudaEventDestroy(end);
    }
    Events(const Events&) = delete;
    Events& operator=(const Events&) = delete;
    cudaEvent_t begin = nullptr, end = nullptr;
  } events;
  float least = std::numeric_limits<float>::infinity();
  for (int i = 0; i < repetitions; ++i) {
    DZ_CUDA(cudaMemsetAsync(scratch, 0, scratch_bytes, stream));
    DZ_CUDA(cudaEventRecord(events.begin, stream));
    launch();
    DZ_CUDA(cudaEventRecord(events.end, stream));
    DZ_CUDA(cudaEventSynchronize(events.end));
    float ms = 0.0F;
    DZ_CUDA(cudaEventElapsedTime(&ms, events.begin, events.end));
    least = std::min(least, ms);
  }
  return least;
}

}  // namespace deltazip::cuda
