#include "backend/cuda/cuda_ops.h"

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/kernels/sbmm/config.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

// Before the members that allocate on it.
const DeviceInfo& on_device(const DeviceInfo& info) {
  use_device(info.device);
  return info;
}

}  // namespace

CudaOps::CudaOps(const DeviceInfo& info)
    : info_(on_device(info)),
      project_(make_project_state()),
      attention_(make_attention_state()),
      sample_(make_sample_state()) {}

void CudaOps::check_model(const ModelShape& shape) const {
  check_attention(shape.cache, shape.dtype);
  check_sampling(shape.vocab_size);
  DZ_CHECK(kSharedBytes <= info_.shared_bytes_per_block, "sbmm: the kernel needs ", kSharedBytes,
           " bytes of shared memory a block, this device has ", info_.shared_bytes_per_block);
}

}  // namespace deltazip::cuda
