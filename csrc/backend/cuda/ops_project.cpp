// Projections: base products and the deltas of a batch.

#include <memory>

#include "backend/cuda/base_product.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/cuda_ops.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {

struct CudaOps::ProjectState {
  explicit ProjectState(const DeviceInfo& info) : base(info.num_sms, info.compute_capability) {}

  BaseProduct base;
};

std::shared_ptr<CudaOps::ProjectState> CudaOps::make_project_state() {
  return std::make_shared<ProjectState>(info_);
}

void CudaOps::run(const LinearParams& params, Stream& stream) {
  DZ_CHECK(params.dtype == info_.compute_dtype && params.weight.dtype == info_.compute_dtype,
           "cuda: x and the weight of a product must be ", name(info_.compute_dtype), ", got ",
           name(params.dtype), " and ", name(params.weight.dtype));
  if (!args_.launching()) return;
  project_->base.run(
      {params.x, params.weight.data, params.y, params.num_rows, params.weight.columns,
       params.weight.rows, params.weight.rows, params.dtype, params.y_dtype},
      args_.mode() == StepMode::kEager, to_cuda(stream).get());
}

}  // namespace deltazip::cuda
