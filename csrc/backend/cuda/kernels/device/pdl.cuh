#pragma once

// Programmatic dependent launch, device side. Every kernel started by launch() calls both.

namespace deltazip::cuda {

// Returns when all that came before in the stream is done and visible. A kernel that skips it
// would let its successor overtake its predecessor.
__device__ __forceinline__ void griddep_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream begin its prologue once every CTA has called this or ended.
__device__ __forceinline__ void griddep_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace deltazip::cuda
