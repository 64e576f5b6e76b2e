#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "backend/cuda/cuda_stream.h"
#include "backend/cuda/step_args.h"
#include "deltazip/backend/backend.h"

namespace deltazip::cuda {

// What is known of the device, and what the backend was asked for.
struct DeviceInfo {
  int device = 0;
  int num_sms = 0;
  std::size_t shared_bytes_per_block = 0;  // the most a kernel may ask for
  DType compute_dtype = DType::kBFloat16;
};

// Turns each op's Params into kernel launches and nothing else. Each subject's ops, and the memory
// they keep between calls, stand in a file of their own (ops_*.cpp). Engine thread.
class CudaOps final : public Ops {
 public:
  explicit CudaOps(const DeviceInfo& info);

  StepArgs& args() { return args_; }
  void check_model(const ModelShape& shape) const;  // cuda_ops.cpp

 private:
  void run(const EmbedParams& params, Stream& stream) override;
  void run(const LinearParams& params, Stream& stream) override;
  void run(const SbmmParams& params, Stream& stream) override;
  void run(const ProjectParams& params, Stream& stream) override;
  void run(const BiasAddParams& params, Stream& stream) override;
  void run(const RmsNormParams& params, Stream& stream) override;
  void run(const SiluMulParams& params, Stream& stream) override;
  void run(const RopeAppendParams& params, Stream& stream) override;
  void run(const PagedAttentionParams& params, Stream& stream) override;
  void run(const GatherRowsParams& params, Stream& stream) override;
  void run(const SampleParams& params, Stream& stream) override;

  struct ProjectState;    // ops_project.cpp: cuBLASLt, workspaces, partial sums
  struct AttentionState;  // ops_attention.cpp: the step's work list, partial results
  struct SampleState;     // ops_sample.cpp: pinned results

  void multiply_sparse(const SbmmParams& params, Stream& stream);  // x lies there in fixed point

  void check_attention(const KvLayer& cache, DType dtype) const;  // throws InvalidArgument
  void check_sampling(std::int64_t vocab_size) const;

  std::shared_ptr<ProjectState> make_project_state();
  std::shared_ptr<AttentionState> make_attention_state();
  std::shared_ptr<SampleState> make_sample_state();

  DeviceInfo info_;
  StepArgs args_;
  // Shared only because that lets each type stay in its own file.
  std::shared_ptr<ProjectState> project_;
  std::shared_ptr<AttentionState> attention_;
  std::shared_ptr<SampleState> sample_;
  std::vector<DeltaMatrix> embed_deltas_;  // of a batch's rows, by value, as the device reads them
};

}  // namespace deltazip::cuda
