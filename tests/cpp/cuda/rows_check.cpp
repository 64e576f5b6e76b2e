// Compares the row-wise kernels and the sampler with the CPU backend, then times them.
//   rows_check [check] [time]

#include "cuda/rows_check.h"

#include <algorithm>
#include <string_view>

namespace deltazip::cuda::check {

double time_in_graph(cudaStream_t stream, const std::function<void()>& launch) {
  constexpr int kLaunches = 200, kRuns = 5;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t recorded = nullptr;
  launch();
  DZ_CUDA(cudaStreamSynchronize(stream));
  DZ_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kLaunches; ++i) launch();
  DZ_CUDA(cudaStreamEndCapture(stream, &graph));
  DZ_CUDA(cudaGraphInstantiate(&recorded, graph, 0));
  cudaEvent_t begin = nullptr, end = nullptr;
  DZ_CUDA(cudaEventCreate(&begin));
  DZ_CUDA(cudaEventCreate(&end));
  float best_ms = 1e9F;
  for (int run = 0; run < kRuns; ++run) {
    DZ_CUDA(cudaEventRecord(begin, stream));
    DZ_CUDA(cudaGraphLaunch(recorded, stream));
    DZ_CUDA(cudaEventRecord(end, stream));
    DZ_CUDA(cudaEventSynchronize(end));
    float ms = 0.0F;
    DZ_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (run > 0) best_ms = std::min(best_ms, ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(recorded);
  cudaGraphDestroy(graph);
  return static_cast<double>(best_ms) * 1000.0 / kLaunches;
}

}  // namespace deltazip::cuda::check

int main(int argc, char** argv) {
  using namespace deltazip::cuda;  // NOLINT(google-build-using-namespace)
  const auto asked = [&](std::string_view what) {
    return argc < 2 || std::find(argv + 1, argv + argc, what) != argv + argc;
  };
  cudaStream_t stream = nullptr;
  DZ_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check::Report report;
  if (asked("check")) {
    check::check_rowwise(report, stream);
    check::check_sampling(report, stream);
  }
  if (asked("time")) {
    check::time_rowwise(stream);
    check::time_sampling(stream);
  }
  std::printf("%d checks, %d failures\n", report.num_checks(), report.num_failures());
  return report.num_failures() == 0 ? 0 : 1;
}
