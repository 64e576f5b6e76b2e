#pragma once

#include <vector>

#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/scratch.h"
#include "deltazip/backend/backend.h"
#include "deltazip/base/thread_pool.h"

namespace deltazip::cpu {

// Cuts every op into independent items and gives them to the threads. Runs at once: a CPU stream
// is empty whenever a call returns. Which thread does what never changes a result.
class CpuOps final : public Ops {
 public:
  CpuOps(const Kernels& kernels, ThreadPool& pool);

 private:
  void run(const EmbedParams& params, Stream& stream) override;
  void run(const LinearParams& params, Stream& stream) override;
  void run(const SbmmParams& params, Stream& stream) override;
  void run(const BiasAddParams& params, Stream& stream) override;
  void run(const RmsNormParams& params, Stream& stream) override;
  void run(const SiluMulParams& params, Stream& stream) override;
  void run(const RopeAppendParams& params, Stream& stream) override;
  void run(const PagedAttentionParams& params, Stream& stream) override;
  void run(const GatherRowsParams& params, Stream& stream) override;
  void run(const SampleParams& params, Stream& stream) override;

  // Calls body(first, last) on ranges of rows, each with enough work to be worth a thread.
  template <typename Body>
  void for_rows(std::int64_t num_rows, std::int64_t floats_per_row, const Body& body);

  const Kernels& kernels_;
  ThreadPool& pool_;
  std::vector<Scratch> scratch_;  // [worker]
  std::vector<SamplerScratch> sampler_scratch_;
};

}  // namespace deltazip::cpu
