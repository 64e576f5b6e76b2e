#pragma once

// SBMM: one persistent launch for all tasks. A CTA walks its items (plan.h); one warp fetches
// records, one fetches x, eight multiply. Sums over the warps of a segment are taken one segment
// late, so that no warp waits for another while records stream in.

#include "backend/cuda/kernels/device/bulk_copy.cuh"
#include "backend/cuda/kernels/device/mbarrier.cuh"
#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/smem.cuh"
#include "backend/cuda/kernels/sbmm/fragments.cuh"
#include "backend/cuda/kernels/sbmm/output.cuh"
#include "backend/cuda/kernels/sbmm/sbmm.h"

namespace deltazip::cuda {

// Shared memory: barriers, zeros, sums, stages, x. Byte offsets from the start of the CTA's.
struct SharedPlaces {
  static constexpr std::uint32_t kFull = 0, kEmpty = 8 * kMaxStages, kXFull = 16 * kMaxStages,
                                 kXFree = kXFull + 16, kSums = kXFree + 16,
                                 kZeros = 512;  // 256 bytes that stand for rows of absent tokens
  std::uint32_t base, stages, x;

  __device__ SharedPlaces(std::uint32_t address, const SbmmCtaRange& range)
      : base(address),
        stages(address + kSharedBytes - range.x_buffers * range.x_bytes -
               range.num_stages * range.stage_bytes),
        x(address + kSharedBytes - range.x_buffers * range.x_bytes) {}
};

// Where the ring of stages stands; every role counts for itself.
struct Ring {
  int slot = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance(int num_stages) {
    if (++slot == num_stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// One x set: a piece of tokens of a task over a panel of segments, and the CTA's items in it.
struct XSet {
  int first_token, num_tokens;      // within the task
  int first_segment, num_segments;  // of the panel
  int begin, end;                   // items within the set, row block slow, segment fast
};

// Calls body(task, set) for every set that the CTA has items of.
template <typename Body>
__device__ __forceinline__ void for_each_set(const SbmmLaunch& params, const SbmmCtaRange& range,
                                             Body&& body) {
  for (int index = range.first_task; index <= range.last_task; ++index) {
    // A copy: stores to y might alias a reference, and every field would be loaded again.
    const SbmmDeviceTask task = params.tasks[index];
    int item = index == range.first_task ? range.first_item : 0;
    const int last = index == range.last_task ? range.last_item : task.num_items;
    if (item >= last) continue;
    const int piece_items = task.row_blocks * task.segments;
    const int panel_items = task.row_blocks * task.panel_segments;
    while (item < last) {
      const int piece = item / piece_items, in_piece = item - piece * piece_items;
      const int panel = in_piece / panel_items, in_panel = in_piece - panel * panel_items;
      XSet set;
      set.first_token = piece * task.piece_tokens;
      set.num_tokens = min(task.piece_tokens, task.num_rows - set.first_token);
      set.first_segment = panel * task.panel_segments;
      set.num_segments = min(task.panel_segments, task.segments - set.first_segment);
      set.begin = in_panel;
      set.end = min(in_panel + last - item, task.row_blocks * set.num_segments);
      item += set.end - set.begin;
      body(task, set);
    }
  }
}

// First record of a segment: the records are cut as evenly as whole ones can be.
__device__ __forceinline__ int segment_begin(const SbmmDeviceTask& task, int segment) {
  return segment * task.segment_floor + min(segment, task.longer_segments);
}

__device__ __forceinline__ void fetch_records(const SbmmLaunch& params, const SbmmCtaRange& range,
                                              const SharedPlaces& places) {
  const std::uint64_t policy = policy_evict_first();
  Ring ring;
  for_each_set(params, range, [&](const SbmmDeviceTask& task, const XSet& set) {
    const auto* data = static_cast<const unsigned char*>(task.data);
    const int record_bytes = task.record_bytes, stage_records = task.stage_records;
    int row_block = set.begin / set.num_segments, segment = set.begin % set.num_segments;
    for (int item = set.begin; item < set.end; ++item) {
      int record = segment_begin(task, set.first_segment + segment);
      const int last = segment_begin(task, set.first_segment + segment + 1);
      const unsigned char* from =
          data + (static_cast<std::int64_t>(row_block) * task.records + record) * record_bytes;
      for (; record < last; record += stage_records) {
        const std::uint32_t num_bytes = min(stage_records, last - record) * record_bytes;
        const std::uint32_t full = places.base + SharedPlaces::kFull + 8 * ring.slot;
        mbarrier_wait(places.base + SharedPlaces::kEmpty + 8 * ring.slot, ring.parity ^ 1);
        mbarrier_arrive_expect_tx(full, num_bytes);
        bulk_copy(places.stages + ring.slot * range.stage_bytes, from, num_bytes, full, policy);
        from += num_bytes;
        ring.advance(range.num_stages);
      }
      if (++segment == set.num_segments) {
        segment = 0;
        ++row_block;
      }
    }
  });
}

// x of a set as it stands in memory, [segment][token], zero beyond the last column.
__device__ __forceinline__ void fetch_x(const SbmmLaunch& params, const SbmmCtaRange& range,
                                        const SharedPlaces& places, unsigned char* shared,
                                        int lane) {
  griddep_wait();
  const bool is_aligned =
      params.x_stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(params.x) % 16 == 0;
  int buffer = 0;
  std::uint32_t parity = 0;
  for_each_set(params, range, [&](const SbmmDeviceTask& task, const XSet& set) {
    const std::uint32_t full = places.base + SharedPlaces::kXFull + 8 * buffer;
    mbarrier_wait(places.base + SharedPlaces::kXFree + 8 * buffer, parity ^ 1);
    async_proxy_fence();
    const int pitch = task.segment_records * (kRecordColumns * 2) + kXPadBytes;
    const bool is_bulk = is_aligned && task.columns % 8 == 0;
    const int first_needed = set.begin % set.num_segments, num_items = set.end - set.begin;
    const auto* rows =
        static_cast<const std::uint16_t*>(params.x) +
        static_cast<std::int64_t>(task.first_row + set.first_token) * params.x_stride;
    const std::uint32_t to = places.x + buffer * range.x_bytes;
    std::uint32_t total = 0;
    for (int s = 0; s < set.num_segments; ++s) {
      // A few items need only their own segments of x.
      const int ahead = s - first_needed + (s < first_needed ? set.num_segments : 0);
      if (ahead >= num_items) continue;
      const int begin = segment_begin(task, set.first_segment + s) * kRecordColumns;
      const int end = segment_begin(task, set.first_segment + s + 1) * kRecordColumns;
      const int valid = min(end, task.columns) - begin;
      const int copied = is_bulk ? valid : 0;
      for (int token = 0; token < set.num_tokens; ++token) {
        const std::uint32_t row = to + (s * set.num_tokens + token) * pitch;
        auto* place = reinterpret_cast<std::uint16_t*>(shared + (row - places.base));
        const std::uint16_t* from = rows + token * params.x_stride + begin;
        for (int k = copied + lane; k < end - begin; k += 32) {
          place[k] = k < valid ? from[k] : std::uint16_t{0};
        }
        if (copied > 0 && token % 32 == lane) bulk_copy(row, from, copied * 2, full);
      }
      total += set.num_tokens * copied * 2;
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive_expect_tx(full, total);
    __syncwarp();
    if (++buffer == range.x_buffers) {
      buffer = 0;
      parity ^= 1;
    }
  });
}

// What a consumer warp knows of itself.
struct Consumer {
  int warp, lane;
  int pair, part;  // row pair, column part
};

// acc = one segment, one warp's part. Frees the stages where is_last_pass.
template <typename T, DeltaType kType, int kParts, int kTiles>
__device__ __forceinline__ void multiply_segment(
    float (&acc)[2][kMaxTiles][4], const SbmmCtaRange& range, const SharedPlaces& places,
    const unsigned char* shared, const SbmmDeviceTask& task, const Consumer& me, int num_records,
    Ring ring, bool is_last_pass, std::uint32_t (&b)[kMaxTiles],
    const std::uint32_t (&b_step)[kMaxTiles]) {
  float own[2][kTiles][4] = {};
  const int record_bytes = task.record_bytes, scales_offset = task.scales_offset;
  const int stage_records = task.stage_records;
  int next = me.part;  // the warp's next record of the segment
  for (int first = 0; first < num_records; first += stage_records) {
    const int last = min(first + stage_records, num_records);
    mbarrier_wait(places.base + SharedPlaces::kFull + 8 * ring.slot, ring.parity);
    const unsigned char* stage =
        shared + (places.stages - places.base) + ring.slot * range.stage_bytes;
    for (; next < last; next += kColumnParts) {
      std::uint32_t at[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) at[n] = b[n] + next * b_step[n];
      multiply_record<T, kType, kParts, kTiles>(own, stage + (next - first) * record_bytes,
                                                scales_offset, me.pair, me.lane, at);
    }
    if (is_last_pass) {
      __syncwarp();
      if (me.lane == 0) mbarrier_arrive(places.base + SharedPlaces::kEmpty + 8 * ring.slot);
    }
    ring.advance(range.num_stages);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[r][n][i] = own[r][n][i];
    }
  }
}

// multiply_segment with the task's format as constants. Functions, not lambdas: these must be
// inlined, or acc would go through local memory.
template <typename T, DeltaType kType, int kParts, typename... Args>
__device__ __forceinline__ void multiply_tiles(int num_tokens, Args&&... args) {
  if (num_tokens <= kTokenTile) {
    multiply_segment<T, kType, kParts, 1>(args...);
  } else {
    multiply_segment<T, kType, kParts, kMaxTiles>(args...);
  }
}
template <typename T, DeltaType kType, typename... Args>
__device__ __forceinline__ void multiply_parts(int scale_parts, Args&&... args) {
  if (scale_parts == 1) {
    multiply_tiles<T, kType, 1>(args...);
  } else if (scale_parts == 2 && is_sparse24(kType)) {
    multiply_tiles<T, kType, is_sparse24(kType) ? 2 : 4>(args...);
  } else {
    multiply_tiles<T, kType, 4>(args...);
  }
}
template <typename T, typename... Args>
__device__ __forceinline__ void multiply_any(DeltaType type, Args&&... args) {
  switch (type) {
    case DeltaType::kSparse24Int4:
      return multiply_parts<T, DeltaType::kSparse24Int4>(args...);
    case DeltaType::kSparse24Int2:
      return multiply_parts<T, DeltaType::kSparse24Int2>(args...);
    case DeltaType::kSparse24Ternary:
      return multiply_parts<T, DeltaType::kSparse24Ternary>(args...);
    case DeltaType::kDenseInt4:
      return multiply_parts<T, DeltaType::kDenseInt4>(args...);
    case DeltaType::kDenseInt8:
      return multiply_parts<T, DeltaType::kDenseInt8>(args...);
  }
}

template <typename T>
__device__ __forceinline__ void consume(const SbmmLaunch& params, const SbmmCtaRange& range,
                                        const SharedPlaces& places, unsigned char* shared,
                                        const Consumer& me) {
  griddep_wait();
  Ring ring;
  int buffer = 0;
  std::uint32_t x_parity = 0;
  SegmentSums<T> sums(params, places.base + SharedPlaces::kSums,
                      reinterpret_cast<float*>(shared + kBarrierBytes), range.sum_tiles, me.warp,
                      me.lane);
  for_each_set(params, range, [&](const SbmmDeviceTask& task, const XSet& set) {
    mbarrier_wait(places.base + SharedPlaces::kXFull + 8 * buffer, x_parity);
    const std::uint32_t x = places.x + buffer * range.x_bytes + me.lane / 8 * 16;
    const std::uint32_t zeros = places.base + SharedPlaces::kZeros + me.lane / 8 * 16;
    const int pitch = task.segment_records * (kRecordColumns * 2) + kXPadBytes;
    const int num_passes = (set.num_tokens + kPassTokens - 1) / kPassTokens;
    int row_block = set.begin / set.num_segments, segment = set.begin % set.num_segments;
    for (int item = set.begin; item < set.end; ++item) {
      const int global_segment = set.first_segment + segment;
      const int num_records =
          segment_begin(task, global_segment + 1) - segment_begin(task, global_segment);
      for (int pass = 0; pass < num_passes; ++pass) {
        std::uint32_t b[kMaxTiles], b_step[kMaxTiles];
        const int tokens_left = set.num_tokens - pass * kPassTokens;
#pragma unroll
        for (int n = 0; n < kMaxTiles; ++n) {
          const int token = pass * kPassTokens + n * kTokenTile + me.lane % 8;
          const bool is_here = token < set.num_tokens;
          b[n] = is_here ? x + (segment * set.num_tokens + token) * pitch : zeros;
          b_step[n] = is_here ? kRecordColumns * 2 : 0;
        }
        float acc[2][kMaxTiles][4];
        const bool is_last_pass = pass + 1 == num_passes;
        multiply_any<T>(task.type, task.scale_parts, tokens_left, acc, range, places, shared, task,
                        me, num_records, ring, is_last_pass, b, b_step);
        sums.finish_pending();
        const bool is_whole = set.num_segments == task.segments && num_passes == 1 &&
                              item - segment >= set.begin &&
                              item - segment + set.num_segments <= set.end;
        sums.put(task, set.first_token + pass * kPassTokens, tokens_left, row_block, global_segment,
                 is_whole, acc);
      }
      for (int first = 0; first < num_records; first += task.stage_records) {
        ring.advance(range.num_stages);
      }
      if (++segment == set.num_segments) {
        segment = 0;
        ++row_block;
      }
    }
    __syncwarp();
    if (me.lane == 0) mbarrier_arrive(places.base + SharedPlaces::kXFree + 8 * buffer);
    if (++buffer == range.x_buffers) {
      buffer = 0;
      x_parity ^= 1;
    }
  });
  sums.finish_pending();
}

template <typename T>
__global__ void __launch_bounds__(kSbmmThreads, 1) sbmm_kernel(const SbmmLaunch params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const SbmmCtaRange range = params.ranges[blockIdx.x];
  const SharedPlaces places(smem_address(shared), range);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxStages; ++i) {
      mbarrier_init(places.base + SharedPlaces::kFull + 8 * i, 1);
      mbarrier_init(places.base + SharedPlaces::kEmpty + 8 * i, kSbmmConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(places.base + SharedPlaces::kXFull + 8 * i, 1);
      mbarrier_init(places.base + SharedPlaces::kXFree + 8 * i, kSbmmConsumerWarps);
      mbarrier_init(places.base + SharedPlaces::kSums + 8 * i, kSbmmConsumerWarps);
    }
    mbarrier_init_fence();
  }
  if (threadIdx.x < 64) {
    reinterpret_cast<std::uint32_t*>(shared + SharedPlaces::kZeros)[threadIdx.x] = 0;
  }
  __syncthreads();
  griddep_launch();
  if (warp == kSbmmConsumerWarps) {
    if (lane == 0) fetch_records(params, range, places);
  } else if (warp == kSbmmConsumerWarps + 1) {
    fetch_x(params, range, places, shared, lane);
  } else {
    consume<T>(params, range, places, shared, {warp, lane, warp % kRowPairs, warp / kRowPairs});
  }
}

}  // namespace deltazip::cuda
