#include "backend/cuda/kernels/paged_attention/paged_attention.h"

#include <algorithm>

#include "backend/cuda/kernels/paged_attention/config.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {

// One translation unit each: head_dim_*.cu.
template <int kHeadDim>
void prepare_head_dim(DType dtype);
template <int kHeadDim>
void launch_head_dim(const PagedAttentionArgs& args, const PagedAttentionLaunch& how,
                     cudaStream_t stream);

namespace {

template <typename Use>
void with_head_dim(std::int32_t head_dim, Use&& use) {
  switch (head_dim) {
    case 64:
      return use.template operator()<64>();
    case 96:
      return use.template operator()<96>();
    case 128:
      return use.template operator()<128>();
    case 256:
      return use.template operator()<256>();
    default:
      DZ_CHECK(false, "paged_attention: the CUDA backend serves head_dim 64, 96, 128 and 256, got ",
               head_dim);
  }
}

}  // namespace

bool is_attention_head_dim(std::int32_t head_dim) {
  return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

std::size_t attention_shared_bytes(std::int32_t head_dim) {
  std::size_t num_bytes = 0;
  with_head_dim(head_dim, [&]<int kHeadDim>() {
    num_bytes =
        std::max(DecodeConfig<kHeadDim>::kSharedBytes, PrefillConfig<kHeadDim>::kSharedBytes);
  });
  return num_bytes;
}

void prepare_paged_attention(DType dtype, std::int32_t head_dim) {
  with_head_dim(head_dim, [&]<int kHeadDim>() { prepare_head_dim<kHeadDim>(dtype); });
}

void launch_paged_attention(const PagedAttentionArgs& args, const PagedAttentionLaunch& how,
                            cudaStream_t stream) {
  with_head_dim(how.head_dim,
                [&]<int kHeadDim>() { launch_head_dim<kHeadDim>(args, how, stream); });
}

}  // namespace deltazip::cuda
