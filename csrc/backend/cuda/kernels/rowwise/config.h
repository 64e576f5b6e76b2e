#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "backend/cuda/kernels/device/launch.h"
#include "deltazip/base/dtype.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda::rowwise {

constexpr int kWidth = 8;      // elements of 2 bytes that one 16-byte access moves
constexpr int kThreads = 256;  // of a CTA that takes a piece of a row: 4 KB of it

// A row of rms_norm is one CTA's, so that its sum needs no second launch. 512 threads of one vector
// are a row of 4096; 4 vectors a thread still leave registers for two CTAs on a multiprocessor.
constexpr int kNormThreads = 512;
constexpr int kMaxNormVectors = 4;

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

// Rows across, pieces of a row down: the number of rows has no useful bound, that of pieces has.
inline LaunchShape shape_of(std::int64_t num_rows, std::int64_t items_per_row) {
  const std::int64_t threads = std::min<std::int64_t>(kThreads, divide_up(items_per_row, 32) * 32);
  return {dim3(static_cast<unsigned>(num_rows),
               static_cast<unsigned>(divide_up(items_per_row, threads))),
          dim3(static_cast<unsigned>(threads)), 0};
}

// Calls body.operator()<T, width>() with the element type and the elements of one access.
template <typename Body>
void dispatch(const char* op, DType dtype, std::int64_t size, const Body& body) {
  const auto with_type = [&]<typename T>() {
    if (size % kWidth == 0) {
      body.template operator()<T, kWidth>();
    } else {
      body.template operator()<T, 1>();
    }
  };
  if (dtype == DType::kFloat16) return with_type.template operator()<__half>();
  if (dtype == DType::kBFloat16) return with_type.template operator()<__nv_bfloat16>();
  DZ_CHECK(false, op, ": expected float16 or bfloat16, got ", name(dtype));
}

}  // namespace deltazip::cuda::rowwise
