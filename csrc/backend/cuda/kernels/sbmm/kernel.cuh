#pragma once

// SBMM: one persistent launch for all tasks. A CTA walks its items (plan.h) set by set. Records go
// straight from memory to the registers of the warp that multiplies them, several half records
// ahead, the first of them before the kernel before has ended; only x lies in shared memory.

#include "backend/cuda/kernels/device/bulk_copy.cuh"
#include "backend/cuda/kernels/device/cp_async.cuh"
#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/smem.cuh"
#include "backend/cuda/kernels/sbmm/fragments.cuh"
#include "backend/cuda/kernels/sbmm/output.cuh"
#include "backend/cuda/kernels/sbmm/plan.h"
#include "backend/cuda/kernels/sbmm/sbmm.h"

namespace deltazip::cuda {

// The sets of a CTA after its first, one after the other.
class SetWalk {
 public:
  SetWalk() = default;
  __device__ explicit SetWalk(const SbmmCtaRange& range)
      : index_(range.set_task),
        item_(range.next_item),
        last_task_(range.last_task),
        last_item_(range.last_item) {}

  // Goes to the next set; one without tokens when there is none.
  __device__ __forceinline__ void next(const SbmmLaunch& params, SbmmSet& set) {
    set.num_tokens = 0;
    while (item_ >= (index_ == last_task_ ? last_item_ : params.tasks[index_].num_items)) {
      if (index_ >= last_task_) return;
      ++index_;
      item_ = 0;
    }
    set.task = params.tasks[index_];
    const int end = index_ == last_task_ ? last_item_ : set.task.num_items;
    item_ += set_place(set, item_, end);
  }

 private:
  int index_, item_, last_task_, last_item_;
};

// x of a set to shared memory, by all threads, as two groups of copies: the columns of the first
// kChunkRecords with all scales, and the rest.
__device__ __forceinline__ void copy_x(const SbmmLaunch& params, const SbmmSet& set,
                                       std::uint32_t place) {
  constexpr int kChunk = kChunkRecords * kRecordColumns;
  static_assert(kChunk * 2 == kSbmmThreads * 16, "the first group of a token is 16 bytes a thread");
  const int row = set.task.records * kRecordColumns;
  const XPlace layout = x_place(set.task.records);
  const auto* from =
      static_cast<const unsigned char*>(params.x) +
      static_cast<std::int64_t>(set.task.first_row + set.first_token) * params.x_row_bytes;
  const int thread = static_cast<int>(threadIdx.x), half = kSbmmThreads / 2;
  const bool is_low = thread >= half;
  const int k = thread % half * 16;
  const unsigned char* bytes = from + (is_low ? row : 0) + k;
  const std::uint32_t to = place + (is_low ? layout.low_offset : 0) + k;
#pragma unroll 1
  for (int first = 0; first < row; first += kChunk) {
    if (first == kChunk) cp_async_commit();
    if (first + k >= row) continue;
#pragma unroll 1
    for (int i = 0; i < set.num_tokens; ++i) {
      cp_async_16(to + first + i * layout.pitch, bytes + first + i * params.x_row_bytes);
    }
    if (first > 0) continue;
#pragma unroll 1
    for (int at = thread * 16; at < set.task.records * 4; at += kSbmmThreads * 16) {
      for (int i = 0; i < set.num_tokens; ++i) {
        cp_async_16(place + layout.scales_offset + at + i * layout.pitch,
                    from + 2 * row + at + i * params.x_row_bytes);
      }
    }
  }
  if (row <= kChunk) cp_async_commit();
  cp_async_commit();
}

// The first row block's records from `first` on towards L2, before the kernel before has ended.
__device__ __forceinline__ void prefetch_records(const SbmmSet& set, int first) {
  const int count = min(set.task.records, kPrefetchedRecords) - first;
  if (count <= 0) return;
  const auto* from =
      static_cast<const unsigned char*>(set.task.data) +
      (static_cast<std::int64_t>(set.begin) * set.task.records + first) * set.task.record_bytes;
  bulk_prefetch(from, count * set.task.record_bytes);
}

// Where a CTA stands between its sets, in shared memory.
struct CtaState {
  SetWalk walk;  // thread 0's
  SbmmSet next[2];
};

// A set with its task's format as constants. A function of its own, so that each format has its own
// registers.
template <DeltaType kType, int kParts, int kTiles>
__device__ __noinline__ void multiply_set(const SbmmSet& its_set, const SbmmLaunch& params,
                                          CtaState& cta, int turn, int sum_bytes) {
  using Half = HalfRecord<kType, kParts>;
  constexpr int kAhead = half_records_ahead(Half::kRegisters, kTiles);
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp = thread / 32, pair = warp % kRowPairs, part = warp / kRowPairs;
  const SbmmSet set = its_set;
  const int records = set.task.records, record_bytes = set.task.record_bytes;

  // The records of a matrix are numbered through; the warp takes one of every kColumnParts.
  const int end = (set.end - set.begin) * records;
  int record = (part - set.begin * records) & (kColumnParts - 1);  // of the set's first row block
  int fetches = (end - record + kColumnParts - 1) / kColumnParts;
  LaneSource source =
      Half::source(static_cast<const unsigned char*>(set.task.data) +
                       (static_cast<std::int64_t>(set.begin) * records + record) * record_bytes,
                   set.task.scales_offset, pair, lane);
  // Values at the start, or ptxas takes them for live before the function and spills them.
  Half halves[kAhead] = {};
  const auto fetch = [&](Half& half) {
    if (fetches > 0) half.load(source);
    --fetches;
    source.advance(kColumnParts * record_bytes);
  };
  static_for<kAhead>([&](auto i) { fetch(halves[i]); });

  if (turn == 0) {
    if (thread == 0) prefetch_records(set, kAhead * kColumnParts);
    griddep_wait();
  }
  // Nobody reads the x before it: who came here has passed the barrier of the last sum.
  const std::uint32_t x = smem_address(shared) + sum_bytes;
  copy_x(params, set, x);
  BlockSums<kTiles> sums(params, set.task, reinterpret_cast<float*>(shared), set.first_token,
                         set.num_tokens, set.begin, warp, lane);
  sums.read_output();
  if (thread == 0) cta.walk.next(params, cta.next[(turn + 1) % 2]);

  // Absent tokens read the last one: columns of a product do not mix, and nobody stores theirs.
  const XPlace layout = x_place(records);
  LaneX<kTiles> at;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const auto token_at = [&](int token) {
      return x + min(n * kTokenTile + token, set.num_tokens - 1) * layout.pitch;
    };
    at.bytes[n] = token_at(lane % 8 / 2) + lane % 2 * layout.low_offset + lane / 8 * 16 +
                  record * kRecordColumns;
    at.scales[n] = token_at(lane % 4) + layout.scales_offset + record * 4;
  }
  float acc[2][kTiles][2] = {};
  cp_async_wait<1>();
  __syncthreads();
  // Steps until something is to be done. A row block ends; or the rest of x is due: before the last
  // step that needs none of it, since with that one a row block may end.
  constexpr int kBeforeRest = kChunkRecords / kColumnParts - 1;
  bool awaits_rest = records > kChunkRecords;
  int blocks = set.end - set.begin;
  const auto steps_of_block = [&] { return (records - record + kColumnParts - 1) / kColumnParts; };
  int until = awaits_rest ? kBeforeRest : steps_of_block();
  // Row blocks end, more than one where a warp has none of their records; false after the last.
  const auto end_blocks = [&] {
    do {
      record += steps_of_block() * kColumnParts - records;
      static_for<2 * kTiles>([&](auto k) {
#pragma unroll
        for (float& sum : acc[k / kTiles][k % kTiles]) sum *= 1.0F / Words<kType>::kUnit;
      });
      sums.finish(acc);
      if (--blocks == 0) return false;
      sums.read_output();
      static_for<2 * kTiles>([&](auto k) {
#pragma unroll
        for (float& sum : acc[k / kTiles][k % kTiles]) sum = 0.0F;
      });
      at.advance(-records);
      until = steps_of_block();
    } while (until == 0);
    return true;
  };
  if (until == 0 && !end_blocks()) return;
  while (true) {
    const bool goes_on = all_of_first<kAhead>([&](auto i) {
      halves[i].multiply(acc, lane, at);
      fetch(halves[i]);
      at.advance(kColumnParts);
      if (--until > 0) return true;
      if (!awaits_rest) return end_blocks();
      awaits_rest = false;
      until = steps_of_block() - kBeforeRest;
      cp_async_wait<0>();
      __syncthreads();
      return true;
    });
    if (!goes_on) return;
  }
}

template <DeltaType kType, int kParts, typename... Args>
__device__ __forceinline__ void multiply_tiles(const SbmmSet& set, Args&&... args) {
  static_assert(kPassTokens == 4 * kTokenTile);
  if (set.num_tokens <= kTokenTile) {
    multiply_set<kType, kParts, 1>(set, args...);
  } else if (set.num_tokens <= 2 * kTokenTile) {
    multiply_set<kType, kParts, 2>(set, args...);
  } else {
    multiply_set<kType, kParts, 4>(set, args...);
  }
}
template <DeltaType kType, typename... Args>
__device__ __forceinline__ void multiply_parts(const SbmmSet& set, Args&&... args) {
  const int scale_parts = set.task.scale_parts;
  if (scale_parts == 1) {
    multiply_tiles<kType, 1>(set, args...);
  } else if (scale_parts == 2 && is_sparse24(kType)) {
    multiply_tiles<kType, is_sparse24(kType) ? 2 : 4>(set, args...);
  } else {
    multiply_tiles<kType, 4>(set, args...);
  }
}
template <typename... Args>
__device__ __forceinline__ void multiply_any(const SbmmSet& set, Args&&... args) {
  switch (set.task.type) {
    case DeltaType::kSparse24Int4:
      return multiply_parts<DeltaType::kSparse24Int4>(set, args...);
    case DeltaType::kSparse24Int2:
      return multiply_parts<DeltaType::kSparse24Int2>(set, args...);
    case DeltaType::kSparse24Ternary:
      return multiply_parts<DeltaType::kSparse24Ternary>(set, args...);
    case DeltaType::kDenseInt4:
      return multiply_parts<DeltaType::kDenseInt4>(set, args...);
    case DeltaType::kDenseInt8:
      return multiply_parts<DeltaType::kDenseInt8>(set, args...);
    case DeltaType::kSparse14Sign:  // comes as ternary
      return;
  }
}

__global__ void __launch_bounds__(kSbmmThreads, kCtasPerSm)
    sbmm_kernel(const __grid_constant__ SbmmLaunch params) {
  griddep_launch();
  __shared__ CtaState cta;
  const SbmmCtaRange& range = params.ranges[blockIdx.x];
  if (range.set.num_tokens == 0) {
    // Must not end before the launch's predecessors, or it would overtake them.
    griddep_wait();
    return;
  }
  if (threadIdx.x == 0) cta.walk = SetWalk(range);
  const SbmmSet* set = &range.set;
  const int sum_bytes = range.sum_bytes;
  for (int turn = 0; set->num_tokens > 0; set = &cta.next[++turn % 2]) {
    multiply_any(*set, params, cta, turn, sum_bytes);
  }
}

}  // namespace deltazip::cuda
