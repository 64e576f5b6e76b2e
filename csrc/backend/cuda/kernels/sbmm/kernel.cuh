#pragma once

// SBMM: one persistent launch for all tasks. A CTA walks its items (plan.h); one warp fetches
// records, one fetches x, sixteen multiply. Sums over the warps of a row block are taken one row
// block late, so that no warp waits for another while records stream in.

#include "backend/cuda/kernels/device/bulk_copy.cuh"
#include "backend/cuda/kernels/device/mbarrier.cuh"
#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/smem.cuh"
#include "backend/cuda/kernels/sbmm/fragments.cuh"
#include "backend/cuda/kernels/sbmm/output.cuh"
#include "backend/cuda/kernels/sbmm/sbmm.h"

namespace deltazip::cuda {

// Shared memory: barriers, sums, stages, x. Addresses of this CTA's.
struct SharedPlaces {
  static constexpr std::uint32_t kFull = 0, kEmpty = 8 * kMaxStages, kXFull = 16 * kMaxStages,
                                 kXFree = kXFull + 16, kSums = kXFree + 16;
  std::uint32_t base, stages, x;

  __device__ SharedPlaces(std::uint32_t address, const SbmmCtaRange& range)
      : base(address),
        stages(address + kSharedBytes - range.x_buffers * range.x_bytes -
               range.num_stages * range.stage_bytes),
        x(address + kSharedBytes - range.x_buffers * range.x_bytes) {}
};

// Where a ring of buffers stands; every role counts for itself.
struct Ring {
  int slot = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance(int num_slots) {
    if (++slot == num_slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// A piece of tokens of a task, and the CTA's items in it.
struct XSet {
  int first_token, num_tokens;  // within the task
  int begin, end;               // items within the piece, row block slow, span fast
};

// Calls body(task, set) for every set that the CTA has items of.
template <typename Body>
__device__ __forceinline__ void for_each_set(const SbmmLaunch& params, const SbmmCtaRange& range,
                                             Body&& body) {
  for (int index = range.first_task; index <= range.last_task; ++index) {
    // A copy: stores to y might alias a reference, and every field would be loaded again.
    const SbmmDeviceTask task = index == range.first_task ? range.task : params.tasks[index];
    int item = index == range.first_task ? range.first_item : 0;
    const int last = index == range.last_task ? range.last_item : task.num_items;
    if (item >= last) continue;
    const int piece_items = task.row_blocks * task.spans;
    while (item < last) {
      const int piece = item / piece_items;
      XSet set;
      set.first_token = piece * task.piece_tokens;
      set.num_tokens = min(task.piece_tokens, task.num_rows - set.first_token);
      set.begin = item - piece * piece_items;
      set.end = min(set.begin + last - item, piece_items);
      item += set.end - set.begin;
      body(task, set);
    }
  }
}

// The part of one row block that a CTA has: spans [span, span + num_spans).
struct Block {
  int row_block, span, num_spans;
};

template <typename Body>
__device__ __forceinline__ void for_each_block(const SbmmDeviceTask& task, const XSet& set,
                                               Body&& body) {
  Block block{set.begin / task.spans, set.begin % task.spans, 0};
  for (int left = set.end - set.begin; left > 0; left -= block.num_spans) {
    block.num_spans = min(task.spans - block.span, left);
    body(block);
    ++block.row_block;
    block.span = 0;
  }
}

__device__ __forceinline__ int first_record(const Block& block) {
  return block.span * kSpanRecords;
}
__device__ __forceinline__ int end_record(const SbmmDeviceTask& task, const Block& block) {
  return min(task.records, (block.span + block.num_spans) * kSpanRecords);
}

__device__ __forceinline__ void fetch_records(const SbmmLaunch& params, const SbmmCtaRange& range,
                                              const SharedPlaces& places) {
  const std::uint64_t policy = policy_evict_first();
  Ring ring;
  for_each_set(params, range, [&](const SbmmDeviceTask& task, const XSet& set) {
    const std::uint32_t record_bytes = task.record_bytes;
    const int stage_records = task.stage_records;
    for_each_block(task, set, [&](const Block& block) {
      int record = first_record(block);
      const int end = end_record(task, block);
      const unsigned char* from =
          static_cast<const unsigned char*>(task.data) +
          (static_cast<std::int64_t>(block.row_block) * task.records + record) * record_bytes;
      for (; record < end; record += stage_records) {
        const std::uint32_t num_bytes = min(stage_records, end - record) * record_bytes;
        const std::uint32_t full = places.base + SharedPlaces::kFull + 8 * ring.slot;
        mbarrier_wait(places.base + SharedPlaces::kEmpty + 8 * ring.slot, ring.parity ^ 1);
        mbarrier_arrive_expect_tx(full, num_bytes);
        bulk_copy(places.stages + ring.slot * range.stage_bytes, from, num_bytes, full, policy);
        from += num_bytes;
        ring.advance(range.num_stages);
      }
    });
  });
}

// Rows of x of a set, for its fetching.
struct XRows {
  const std::uint16_t* first;
  std::int64_t stride;
  int columns;
  bool is_bulk;

  __device__ XRows(const SbmmLaunch& params, const SbmmDeviceTask& task, const XSet& set)
      : first(static_cast<const std::uint16_t*>(params.x) +
              static_cast<std::int64_t>(task.first_row + set.first_token) * params.x_stride),
        stride(params.x_stride),
        columns(task.columns),
        is_bulk(params.x_stride % 8 == 0 && task.columns % 8 == 0 &&
                reinterpret_cast<std::uintptr_t>(params.x) % 16 == 0) {}
};

// Columns [begin, end) of a token to shared memory by one warp, zero beyond the last; bulk copies
// by the lane `issuer`. Returns the bytes that these will bring.
__device__ __forceinline__ int copy_x(const XRows& rows, int token, int begin, int end,
                                      std::uint32_t to, unsigned char* place, std::uint32_t full,
                                      int issuer, int lane) {
  const std::uint16_t* from = rows.first + token * rows.stride + begin;
  const int valid = min(end, rows.columns) - begin, copied = rows.is_bulk ? valid : 0;
  auto* halves = reinterpret_cast<std::uint16_t*>(place);
  for (int k = copied + lane; k < end - begin; k += 32) {
    halves[k] = k < valid ? from[k] : std::uint16_t{0};
  }
  if (copied > 0 && issuer == lane) bulk_copy(to, from, copied * 2, full);
  return copied * 2;
}

// x of whole sets, [token][columns].
__device__ __forceinline__ void fetch_sets(const SbmmLaunch& params, const SbmmCtaRange& range,
                                           const SharedPlaces& places, unsigned char* shared,
                                           int lane) {
  Ring ring;
  for_each_set(params, range, [&](const SbmmDeviceTask& task, const XSet& set) {
    const std::uint32_t full = places.base + SharedPlaces::kXFull + 8 * ring.slot;
    mbarrier_wait(places.base + SharedPlaces::kXFree + 8 * ring.slot, ring.parity ^ 1);
    async_proxy_fence();
    const XRows rows(params, task, set);
    const int pitch = task.records * (kRecordColumns * 2) + kXPadBytes;
    const int first_needed = set.begin % task.spans, num_items = set.end - set.begin;
    const std::uint32_t buffer = places.x + ring.slot * range.x_bytes;
    int total = 0, issuer = 0;
    for (int i = 0; i < min(task.spans, num_items); ++i) {
      const int span =
          first_needed + i < task.spans ? first_needed + i : first_needed + i - task.spans;
      const int begin = span * (kSpanRecords * kRecordColumns);
      const int end = min(task.records * kRecordColumns, begin + kSpanRecords * kRecordColumns);
      for (int token = 0; token < set.num_tokens; ++token) {
        const std::uint32_t to = buffer + token * pitch + begin * 2;
        total +=
            copy_x(rows, token, begin, end, to, shared + (to - places.base), full, issuer, lane);
        issuer = (issuer + 1) % 32;
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive_expect_tx(full, total);
    __syncwarp();
    ring.advance(range.x_buffers);
  });
}

// x of every stage beside its records, [token][columns of the stage].
__device__ __forceinline__ void fetch_stages(const SbmmLaunch& params, const SbmmCtaRange& range,
                                             const SharedPlaces& places, unsigned char* shared,
                                             int lane) {
  Ring ring;
  for_each_set(params, range, [&](const SbmmDeviceTask& task, const XSet& set) {
    const XRows rows(params, task, set);
    const int stage_records = task.stage_records;
    const int pitch = stage_records * (kRecordColumns * 2) + kXPadBytes;
    for_each_block(task, set, [&](const Block& block) {
      const int end = end_record(task, block);
      for (int record = first_record(block); record < end; record += stage_records) {
        const std::uint32_t full = places.base + SharedPlaces::kFull + 8 * ring.slot;
        const std::uint32_t stage_x =
            places.stages + ring.slot * range.stage_bytes + stage_records * task.record_bytes;
        mbarrier_wait(places.base + SharedPlaces::kEmpty + 8 * ring.slot, ring.parity ^ 1);
        async_proxy_fence();
        const int first = record * kRecordColumns;
        const int last = min(record + stage_records, end) * kRecordColumns;
        int total = 0;
        for (int token = 0; token < set.num_tokens; ++token) {
          const std::uint32_t to = stage_x + token * pitch;
          total +=
              copy_x(rows, token, first, last, to, shared + (to - places.base), full, token, lane);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive_expect_tx(full, total);
        __syncwarp();
        ring.advance(range.num_stages);
      }
    });
  });
}

// A consumer warp.
struct Consumer {
  int warp, lane;
  int pair, part;  // row pair, column part
  Ring ring;
  int num_blocks;  // finished
};

// A set with its task's format as constants. A function of its own, so that each format has its own
// registers; what its loops read is copied first, or every barrier would have it loaded again.
template <typename T, DeltaType kType, int kParts, int kTiles>
__device__ __noinline__ void multiply_set(const SbmmLaunch& launch, const SbmmCtaRange& cta_range,
                                          const SharedPlaces& places,
                                          const SbmmDeviceTask& set_task, const XSet& task_set,
                                          std::uint32_t x, Consumer& me) {
  extern __shared__ __align__(128) unsigned char shared[];
  const SbmmLaunch params = launch;
  const SbmmCtaRange range = cta_range;
  const SbmmDeviceTask task = set_task;
  const XSet set = task_set;
  const int stage_records = task.stage_records, record_bytes = task.record_bytes;
  const int scales_offset = task.scales_offset;
  const bool streams_x = range.x_buffers == 0;
  const int pitch = (streams_x ? stage_records : task.records) * (kRecordColumns * 2) + kXPadBytes;
  const std::uint32_t stages = places.stages, base = places.base;
  const int stage_bytes = range.stage_bytes, num_stages = range.num_stages;
  const int part = me.part, pair = me.pair, lane = me.lane, num_tokens = set.num_tokens;
  Ring ring = me.ring;
  BlockSums<T> sums(params, base + SharedPlaces::kSums,
                    reinterpret_cast<float*>(shared + kBarrierBytes), range.sum_tokens, me.warp,
                    lane, me.num_blocks);
  // Absent tokens read the last one: columns of a product do not mix, and nobody stores theirs.
  std::uint32_t token_at[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int token = min(n * kTokenTile + lane % 8, num_tokens - 1);
    token_at[n] = token * pitch + lane / 8 * 16 + x;
  }
  for_each_block(task, set, [&](const Block& block) {
    const bool is_whole = block.num_spans == task.spans;
    const int slot = block.span > 0 ? range.first_slot : static_cast<int>(blockIdx.x);
    float* scratch = params.scratch + static_cast<std::int64_t>(slot) * range.slot_floats;
    const int end = end_record(task, block);
    int record = first_record(block);
    float total[2][kTiles][4] = {};
    for (int span = block.span; record < end; ++span) {
      float acc[2][kTiles][4] = {};
      const int span_end = min(record + kSpanRecords, end);
      for (; record < span_end; record += stage_records) {
        const int num_records = min(stage_records, span_end - record);
        const std::uint32_t stage = stages + ring.slot * stage_bytes;
        const std::uint32_t x_here =
            streams_x ? stage + stage_records * record_bytes : record * (kRecordColumns * 2);
        mbarrier_wait(base + SharedPlaces::kFull + 8 * ring.slot, ring.parity);
        for (int k = (part - record) & (kColumnParts - 1); k < num_records; k += kColumnParts) {
          std::uint32_t at[kTiles];
#pragma unroll
          for (int n = 0; n < kTiles; ++n) at[n] = token_at[n] + x_here + k * (kRecordColumns * 2);
          multiply_record<T, kType, kParts, kTiles>(acc, shared + (stage - base) + k * record_bytes,
                                                    scales_offset, pair, lane, at);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(base + SharedPlaces::kEmpty + 8 * ring.slot);
        ring.advance(num_stages);
      }
      if (!is_whole) {
        sums.put_span(scratch, span, task.piece_tokens, acc, num_tokens);
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) total[r][n][i] += acc[r][n][i];
          }
        }
      }
    }
    sums.finish_pending();
    if (is_whole) sums.put(total, num_tokens);
    sums.hand_over(task, set.first_token, num_tokens, block.row_block, block.num_spans, slot,
                   scratch);
  });
  sums.finish_pending();
  me.ring = ring;
  me.num_blocks = sums.num_blocks();
}

template <typename T, DeltaType kType, int kParts, typename... Args>
__device__ __forceinline__ void multiply_tiles(int num_tokens, Args&&... args) {
  if (num_tokens <= kTokenTile) {
    multiply_set<T, kType, kParts, 1>(args...);
  } else {
    multiply_set<T, kType, kParts, kPassTokens / kTokenTile>(args...);
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
                                        const SharedPlaces& places, Consumer me) {
  griddep_wait();
  Ring x_ring;
  for_each_set(params, range, [&](const SbmmDeviceTask& task, const XSet& set) {
    std::uint32_t x = 0;
    if (range.x_buffers > 0) {
      mbarrier_wait(places.base + SharedPlaces::kXFull + 8 * x_ring.slot, x_ring.parity);
      x = places.x + x_ring.slot * range.x_bytes;
    }
    multiply_any<T>(task.type, task.scale_parts, set.num_tokens, params, range, places, task, set,
                    x, me);
    if (range.x_buffers > 0) {
      __syncwarp();
      if (me.lane == 0) mbarrier_arrive(places.base + SharedPlaces::kXFree + 8 * x_ring.slot);
      x_ring.advance(range.x_buffers);
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kSbmmThreads, 1) sbmm_kernel(const SbmmLaunch params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const SbmmCtaRange range = params.ranges[blockIdx.x];
  const SharedPlaces places(smem_address(shared), range);
  // A stage is full when its records and, where it rides along, its x have come.
  if (warp == 0) {
    if (lane < kMaxStages) {
      mbarrier_init(places.base + SharedPlaces::kFull + 8 * lane, range.x_buffers == 0 ? 2 : 1);
      mbarrier_init(places.base + SharedPlaces::kEmpty + 8 * lane, kSbmmConsumerWarps);
    } else if (lane < kMaxStages + 2) {
      const int i = lane - kMaxStages;
      mbarrier_init(places.base + SharedPlaces::kXFull + 8 * i, 1);
      mbarrier_init(places.base + SharedPlaces::kXFree + 8 * i, kSbmmConsumerWarps);
      mbarrier_init(places.base + SharedPlaces::kSums + 8 * i, kSbmmConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  griddep_launch();
  if (warp == kSbmmConsumerWarps) {
    if (lane == 0) fetch_records(params, range, places);
  } else if (warp == kSbmmConsumerWarps + 1) {
    griddep_wait();
    if (range.x_buffers > 0) {
      fetch_sets(params, range, places, shared, lane);
    } else {
      fetch_stages(params, range, places, shared, lane);
    }
  } else {
    consume<T>(params, range, places, {warp, lane, warp % kRowPairs, warp / kRowPairs, {}, 0});
  }
}

}  // namespace deltazip::cuda
