#include "backend/cuda/step_graph.h"

#include "backend/cuda/cuda_check.h"

namespace deltazip::cuda {
namespace {

// Ends what was begun, however the body of a step ends.
class Turn {
 public:
  Turn(StepArgs& args, StepMode mode) : args_(args) { args_.begin(mode); }
  ~Turn() { args_.end(); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  StepArgs& args_;
};

}  // namespace

StepGraphs::~StepGraphs() {
  for (auto& [key, step] : steps_) {
    if (step.graph != nullptr) cudaGraphExecDestroy(step.graph);
  }
}

void StepGraphs::run(const StepKey& key, CudaStream& stream, const std::function<void()>& body) {
  const auto [found, is_new] = steps_.try_emplace(key);
  Recorded& step = found->second;
  if (step.graph == nullptr) {
    try {
      if (is_new) return body();
      record(step, stream, body);
    } catch (...) {
      steps_.erase(found);  // what its eager step should have made may be missing: it starts anew
      throw;
    }
  } else {
    const Turn turn(args_, StepMode::kReplay);
    body();
    DZ_INTERNAL(args_.num_bytes() == step.argument_bytes, "a recorded step brought ",
                step.argument_bytes, " bytes of arguments, its replay brings ", args_.num_bytes());
    args_.upload(stream);
  }
  DZ_CUDA(cudaGraphLaunch(step.graph, stream.get()));
}

void StepGraphs::record(Recorded& step, CudaStream& stream, const std::function<void()>& body) {
  const Turn turn(args_, StepMode::kRecord);
  DZ_CUDA(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    body();
  } catch (...) {
    cudaStreamEndCapture(stream.get(), &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  DZ_CUDA(cudaStreamEndCapture(stream.get(), &graph));
  args_.upload(stream);
  const cudaError_t error = cudaGraphInstantiate(&step.graph, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(error, "cudaGraphInstantiate");
  step.argument_bytes = args_.num_bytes();
}

}  // namespace deltazip::cuda
