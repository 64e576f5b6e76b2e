#include "backend/cuda/kernels/paged_attention/instantiate.cuh"

namespace deltazip::cuda {

template void prepare_head_dim<96>(DType);
template void launch_head_dim<96>(const PagedAttentionArgs&, const PagedAttentionLaunch&,
                                  cudaStream_t);

}  // namespace deltazip::cuda
