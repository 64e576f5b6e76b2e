#pragma once

#include "backend/cuda/kernels/device/launch.h"
#include "backend/cuda/kernels/paged_attention/decode.cuh"
#include "backend/cuda/kernels/paged_attention/prefill.cuh"

namespace deltazip::cuda {

template <typename T, int kHeadDim>
void prepare_of() {
  allow_shared_memory(paged_attention_decode<T, kHeadDim>, DecodeConfig<kHeadDim>::kSharedBytes);
  allow_shared_memory(paged_attention_prefill<T, kHeadDim>, PrefillConfig<kHeadDim>::kSharedBytes);
}

template <typename T, int kHeadDim>
void launch_of(const PagedAttentionArgs& args, const PagedAttentionLaunch& how,
               cudaStream_t stream) {
  using Decode = DecodeConfig<kHeadDim>;
  using Prefill = PrefillConfig<kHeadDim>;
  const auto num_sms = static_cast<unsigned>(how.num_sms);
  if (how.may_prefill) {
    launch(paged_attention_prefill<T, kHeadDim>,
           {num_sms * Prefill::kCtasPerSm, Prefill::kThreads, Prefill::kSharedBytes}, stream, args);
  }
  if (!how.may_decode) return;
  launch(paged_attention_decode<T, kHeadDim>,
         {num_sms * Decode::kCtasPerSm, Decode::kThreads, Decode::kSharedBytes}, stream, args);
}

template <int kHeadDim>
void prepare_head_dim(DType dtype) {
  dtype == DType::kFloat16 ? prepare_of<__half, kHeadDim>() : prepare_of<__nv_bfloat16, kHeadDim>();
}

template <int kHeadDim>
void launch_head_dim(const PagedAttentionArgs& args, const PagedAttentionLaunch& how,
                     cudaStream_t stream) {
  if (how.dtype == DType::kFloat16) {
    launch_of<__half, kHeadDim>(args, how, stream);
  } else {
    launch_of<__nv_bfloat16, kHeadDim>(args, how, stream);
  }
}

}  // namespace deltazip::cuda
