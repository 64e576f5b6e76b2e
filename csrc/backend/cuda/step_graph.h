#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <map>

#include "backend/cuda/step_args.h"
#include "deltazip/backend/backend.h"

namespace deltazip::cuda {

// Steps recorded as CUDA graphs, one for each key. The first time a key comes its step runs
// eagerly, so that everything made on first use is made; the second time it is recorded. A step
// that throws before its graph exists is forgotten. Engine thread.
class StepGraphs {
 public:
  explicit StepGraphs(StepArgs& args) : args_(args) {}
  ~StepGraphs();
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  void run(const StepKey& key, CudaStream& stream, const std::function<void()>& body);

 private:
  struct Recorded {
    cudaGraphExec_t graph = nullptr;
    std::size_t argument_bytes = 0;
  };

  void record(Recorded& step, CudaStream& stream, const std::function<void()>& body);

  StepArgs& args_;
  std::map<StepKey, Recorded> steps_;
};

}  // namespace deltazip::cuda
