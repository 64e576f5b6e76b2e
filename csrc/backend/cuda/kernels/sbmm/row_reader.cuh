#pragma once

// Rows of a tiled delta of any type, for kernels that gather them.

#include <cuda_fp16.h>

#include "backend/cuda/kernels/sbmm/read.cuh"

namespace deltazip::cuda {

// Four neighbouring weights of a delta.
struct DeltaWeights {
  float v[4];
};

// Weights [row, 4 group .. 4 group + 3]; those past the last column are to be ignored. Lanes of a
// warp that take neighbouring groups of one row read the record's words together.
__device__ __forceinline__ DeltaWeights read_delta(const DeltaMatrix& delta,
                                                   const RecordLayout& layout, std::int64_t row,
                                                   std::int64_t group) {
  const auto* record =
      static_cast<const unsigned char*>(delta.data) +
      (row / kRecordRows * layout.records + group / kRecordGroups) * layout.record_bytes;
  const int r = static_cast<int>(row % kRecordRows), g = static_cast<int>(group % kRecordGroups);
  const int part = g * 4 / (kRecordColumns / layout.scale_parts);
  const __half scale = reinterpret_cast<const __half*>(record + layout.scales_offset +
                                                       part * kScalePartBytes)[scale_place(r)];
  const GroupValues values = read_group(record, delta.type, r, g);
  DeltaWeights out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.v[i] = values.v[i] * __half2float(scale);
  return out;
}

}  // namespace deltazip::cuda
