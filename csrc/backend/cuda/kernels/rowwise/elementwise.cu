// bias_add, silu_mul and gather_rows.

#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/vec.cuh"
#include "backend/cuda/kernels/rowwise/config.h"
#include "backend/cuda/kernels/rowwise/rowwise.h"

namespace deltazip::cuda {
namespace {

using rowwise::dispatch;
using rowwise::kThreads;
using rowwise::shape_of;

__device__ __forceinline__ std::int64_t first_element(int width) {
  return (std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * width;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) bias_add_kernel(const BiasAddLaunch params) {
  griddep_launch();
  const std::int64_t row = blockIdx.x, i = first_element(kWidth);
  const float* bias = params.row_biases[row];
  const bool is_mine = bias != nullptr && i < params.size;
  float biases[kWidth];
  if (is_mine) load_floats(biases, bias + i);
  griddep_wait();
  if (!is_mine) return;
  T* at = static_cast<T*>(params.y) + row * params.size + i;
  Vec<T, kWidth> y = load_vec<kWidth>(at);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) y.data[j] = from_float<T>(to_float(y.data[j]) + biases[j]);
  store_vec(at, y);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(const SiluMulLaunch params) {
  griddep_launch();
  griddep_wait();
  const std::int64_t row = blockIdx.x, i = first_element(kWidth);
  if (i >= params.size) return;
  const T* gates = static_cast<const T*>(params.gate_up) + row * 2 * params.size + i;
  const Vec<T, kWidth> gate = load_vec<kWidth>(gates);
  const Vec<T, kWidth> up = load_vec<kWidth>(gates + params.size);
  Vec<T, kWidth> out;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float g = to_float(gate.data[j]);
    out.data[j] = from_float<T>(g / (1.0F + __expf(-g)) * to_float(up.data[j]));
  }
  store_vec(static_cast<T*>(params.out) + row * params.size + i, out);
}

template <typename Word>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(const GatherRowsLaunch params) {
  griddep_launch();
  const std::int64_t i = first_element(1), row_words = params.row_bytes / sizeof(Word);
  const std::int64_t source = params.rows[blockIdx.x];
  griddep_wait();
  if (i >= row_words) return;
  static_cast<Word*>(params.out)[blockIdx.x * row_words + i] =
      static_cast<const Word*>(params.x)[source * row_words + i];
}

}  // namespace

void launch_bias_add(const BiasAddLaunch& params, cudaStream_t stream) {
  dispatch("bias_add", params.dtype, params.size, [&]<typename T, int kWidth>() {
    launch(bias_add_kernel<T, kWidth>, shape_of(params.num_rows, params.size / kWidth), stream,
           params);
  });
}

void launch_silu_mul(const SiluMulLaunch& params, cudaStream_t stream) {
  dispatch("silu_mul", params.dtype, params.size, [&]<typename T, int kWidth>() {
    launch(silu_mul_kernel<T, kWidth>, shape_of(params.num_rows, params.size / kWidth), stream,
           params);
  });
}

void launch_gather_rows(const GatherRowsLaunch& params, cudaStream_t stream) {
  const auto with_word = [&]<typename Word>() {
    launch(gather_rows_kernel<Word>,
           shape_of(params.num_rows, params.row_bytes / static_cast<std::int64_t>(sizeof(Word))),
           stream, params);
  };
  if (params.row_bytes % 16 == 0) return with_word.template operator()<uint4>();
  if (params.row_bytes % 4 == 0) return with_word.template operator()<std::uint32_t>();
  if (params.row_bytes % 2 == 0) return with_word.template operator()<std::uint16_t>();
  with_word.template operator()<std::uint8_t>();
}

}  // namespace deltazip::cuda
