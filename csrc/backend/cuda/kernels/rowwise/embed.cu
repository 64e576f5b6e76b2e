// out = table[token] (+ the row of the variant's delta).

#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/vec.cuh"
#include "backend/cuda/kernels/rowwise/config.h"
#include "backend/cuda/kernels/rowwise/rowwise.h"

namespace deltazip::cuda {
namespace {

template <typename T, int kWidth>
__global__ void __launch_bounds__(rowwise::kThreads) embed_kernel(const EmbedLaunch params) {
  griddep_launch();
  griddep_wait();  // the token may be the last kernel's choice
  const std::int64_t row = blockIdx.x;
  const std::int64_t i = (std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kWidth;
  if (i >= params.hidden_size) return;
  std::int64_t token = params.tokens[row];
  if (token < 0) token = params.sampled[~token];
  const Vec<T, kWidth> base =
      load_vec<kWidth>(static_cast<const T*>(params.table) + token * params.hidden_size + i);
  store_vec(static_cast<T*>(params.out) + row * params.hidden_size + i, base);
}

}  // namespace

void launch_embed(const EmbedLaunch& params, cudaStream_t stream) {
  rowwise::dispatch("embed", params.dtype, params.hidden_size, [&]<typename T, int kWidth>() {
    launch(embed_kernel<T, kWidth>, rowwise::shape_of(params.num_rows, params.hidden_size / kWidth),
           stream, params);
  });
}

}  // namespace deltazip::cuda
