// Rotates q (rotate-half) in place; stores rotated k, and v, in the paged cache.

#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/vec.cuh"
#include "backend/cuda/kernels/rowwise/config.h"
#include "backend/cuda/kernels/rowwise/rowwise.h"

namespace deltazip::cuda {
namespace {

// A thread takes kWidth places of a head's lower half and their partners in the upper half.
template <typename T, int kWidth>
__global__ void __launch_bounds__(rowwise::kThreads)
    rope_append_kernel(const RopeAppendLaunch params) {
  griddep_launch();
  const int half = params.head_dim / 2, num_kv_heads = params.num_kv_heads;
  const int num_heads = params.num_heads + 2 * num_kv_heads;
  const int item = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  const int head = item / (half / kWidth), i = item % (half / kWidth) * kWidth;
  const bool is_query = head < params.num_heads;
  const bool is_value = head >= params.num_heads + num_kv_heads;
  const std::int64_t row = blockIdx.x, slot = params.cache_slots[row];
  const bool is_idle = head >= num_heads || (!is_query && slot < 0);
  float cosines[kWidth], sines[kWidth];
  if (!is_idle && !is_value) {
    const float* angles =
        params.cos_sin + std::int64_t{params.angle_rows[row]} * params.head_dim + i;
    load_floats(cosines, angles);
    load_floats(sines, angles + half);
  }
  griddep_wait();
  if (is_idle) return;

  T* source = static_cast<T*>(params.qkv) + (row * num_heads + head) * params.head_dim + i;
  Vec<T, kWidth> low = load_vec<kWidth>(source), high = load_vec<kWidth>(source + half);
  if (!is_value) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float x = to_float(low.data[j]), y = to_float(high.data[j]);
      low.data[j] = from_float<T>(x * cosines[j] - y * sines[j]);
      high.data[j] = from_float<T>(y * cosines[j] + x * sines[j]);
    }
  }
  T* to = source;
  if (!is_query) {
    const std::int64_t block = slot / params.block_size, offset = slot % params.block_size;
    const int kv_head = (head - params.num_heads) % num_kv_heads;
    to = static_cast<T*>(is_value ? params.values : params.keys) +
         ((block * num_kv_heads + kv_head) * params.block_size + offset) * params.head_dim + i;
  }
  store_vec(to, low);
  store_vec(to + half, high);
}

}  // namespace

void launch_rope_append(const RopeAppendLaunch& params, cudaStream_t stream) {
  const std::int64_t half = params.head_dim / 2;
  const std::int64_t num_heads = params.num_heads + 2 * params.num_kv_heads;
  rowwise::dispatch("rope_append", params.dtype, half, [&]<typename T, int kWidth>() {
    launch(rope_append_kernel<T, kWidth>,
           rowwise::shape_of(params.num_rows, num_heads * (half / kWidth)), stream, params);
  });
}

}  // namespace deltazip::cuda
