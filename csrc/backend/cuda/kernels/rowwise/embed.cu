// out = table[token] (+ the row of the variant's delta).

#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/vec.cuh"
#include "backend/cuda/kernels/rowwise/config.h"
#include "backend/cuda/kernels/rowwise/rowwise.h"
#include "backend/cuda/kernels/sbmm/row_reader.cuh"

namespace deltazip::cuda {
namespace {

// values[j] += the delta at (row, first + j). `first` is a multiple of kWidth.
template <int kWidth>
__device__ __forceinline__ void add_delta(float (&values)[kWidth], const DeltaMatrix& delta,
                                          std::int64_t row, std::int64_t first) {
  const RecordLayout layout =
      record_layout(delta.type, delta.rows, delta.columns, delta.group_size);
  if constexpr (kWidth == 1) {
    const DeltaWeights weights = read_delta(delta, layout, row, first / 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[0] += first % 4 == j ? weights.v[j] : 0.0F;
  } else {
#pragma unroll
    for (int begin = 0; begin < kWidth; begin += 4) {
      const DeltaWeights weights = read_delta(delta, layout, row, (first + begin) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[begin + j] += weights.v[j];
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(rowwise::kThreads) embed_kernel(const EmbedLaunch params) {
  griddep_launch();
  griddep_wait();  // the token may be the last kernel's choice
  const std::int64_t row = blockIdx.x;
  const std::int64_t i = (std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kWidth;
  if (i >= params.hidden_size) return;
  std::int64_t token = params.tokens[row];
  if (token < 0) token = params.sampled[~token];
  Vec<T, kWidth> out =
      load_vec<kWidth>(static_cast<const T*>(params.table) + token * params.hidden_size + i);
  if (params.row_deltas != nullptr && params.row_deltas[row].data != nullptr) {
    float values[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] = to_float(out.data[j]);
    add_delta(values, params.row_deltas[row], token, i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out.data[j] = from_float<T>(values[j]);
  }
  store_vec(static_cast<T*>(params.out) + row * params.hidden_size + i, out);
}

}  // namespace

void launch_embed(const EmbedLaunch& params, cudaStream_t stream) {
  rowwise::dispatch("embed", params.dtype, params.hidden_size, [&]<typename T, int kWidth>() {
    launch(embed_kernel<T, kWidth>, rowwise::shape_of(params.num_rows, params.hidden_size / kWidth),
           stream, params);
  });
}

}  // namespace deltazip::cuda
