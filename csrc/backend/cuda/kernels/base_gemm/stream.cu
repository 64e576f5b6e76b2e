#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>

#include "backend/cuda/kernels/base_gemm/base_gemm.h"
#include "backend/cuda/kernels/base_gemm/stream.cuh"
#include "backend/cuda/kernels/device/launch.h"

namespace deltazip::cuda {
namespace {

using namespace base_gemm;

// The driver's own function, asked for at run time: nothing links libcuda.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  DZ_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found));
  DZ_INTERNAL(found == cudaDriverEntryPointSuccess && function != nullptr,
              "the NVIDIA driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// Boxes of [box_rows, 64] of a row-major matrix; what a box has outside of it reads as zero.
CUtensorMap matrix_map(const void* data, std::int64_t rows, std::int64_t columns, int box_rows,
                       DType dtype) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  const cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap map;
  const CUresult result = encode(
      &map,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(data), size, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  DZ_INTERNAL(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses a matrix [", rows, ", ",
              columns, "] at ", data, ": error ", static_cast<int>(result));
  return map;
}

template <typename T, int kTokens, Form kForm>
void launch_form(const StreamGemm& params, cudaStream_t stream) {
  using Shape = StreamShape<kTokens, kForm>;
  const auto kernel = stream_gemm<T, Shape>;
  allow_shared_memory(kernel, Shape::kSmemBytes);
  const Schedule schedule = make_schedule(params.out_features, params.in_features, params.num_sms);
  const StreamArgs args{params.y,
                        reinterpret_cast<float4*>(params.partials),
                        params.counters,
                        schedule,
                        static_cast<std::int32_t>(params.num_tokens),
                        static_cast<std::int32_t>(params.out_features),
                        params.y_dtype == DType::kFloat32};
  launch(
      kernel, {schedule.num_ctas, Shape::kThreads, Shape::kSmemBytes}, stream,
      matrix_map(params.weight, params.out_features, params.in_features, kBlockRows, params.dtype),
      matrix_map(params.x, params.num_tokens, params.in_features, kTokens, params.dtype), args);
}

template <typename T, int kTokens>
void launch_tokens(const StreamGemm& params, cudaStream_t stream) {
  if (params.form == Form::kDeep) return launch_form<T, kTokens, Form::kDeep>(params, stream);
  launch_form<T, kTokens, Form::kWide>(params, stream);
}

// Calls f with the smallest of the instantiated token counts that holds num_tokens.
template <typename F>
void with_tokens(std::int64_t num_tokens, F&& f) {
  if (num_tokens <= 8) return f.template operator()<8>();
  if (num_tokens <= 16) return f.template operator()<16>();
  if (num_tokens <= 32) return f.template operator()<32>();
  return f.template operator()<64>();
}

}  // namespace

bool stream_gemm_takes(const StreamGemm& params) {
  const auto is_aligned = [](const void* p) { return std::bit_cast<std::uintptr_t>(p) % 16 == 0; };
  const Schedule schedule = make_schedule(params.out_features, params.in_features, params.num_sms);
  return runs_hopper_code() && params.num_tokens >= 1 && params.num_tokens <= kMaxTokens &&
         params.in_features % 8 == 0 && is_aligned(params.x) && is_aligned(params.weight) &&
         std::int64_t{schedule.num_units} < (1 << 26);
}

std::size_t stream_gemm_partials_bytes(int num_sms) {
  return std::size_t{2} * static_cast<std::size_t>(num_sms) * kBlockRows * kMaxTokens *
         sizeof(float);
}

std::size_t stream_gemm_counters_bytes(std::int64_t out_features) {
  const std::int64_t blocks = (out_features + kBlockRows - 1) / kBlockRows;
  return static_cast<std::size_t>(blocks * (kBlockRows / kWarpRows)) * sizeof(std::uint32_t);
}

void launch_stream_gemm(const StreamGemm& params, cudaStream_t stream) {
  DZ_INTERNAL(stream_gemm_takes(params), "stream_gemm: [", params.num_tokens, ", ",
              params.in_features, "] x [", params.out_features, ", ", params.in_features,
              "] is not for it");
  with_tokens(params.num_tokens, [&]<int kTokens>() {
    if (params.dtype == DType::kFloat16) {
      launch_tokens<__half, kTokens>(params, stream);
    } else {
      launch_tokens<__nv_bfloat16, kTokens>(params, stream);
    }
  });
}

}  // namespace deltazip::cuda
