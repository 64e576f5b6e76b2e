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

// x of a set to shared memory, [token][columns, zeros up to whole records], by all threads, as two
// groups of copies: the columns of the first kChunkRecords, and the rest.
__device__ __forceinline__ void copy_x(const SbmmLaunch& params, const SbmmSet& set,
                                       unsigned char* place) {
  constexpr int kChunk = kChunkRecords * kRecordColumns;
  const int columns = set.task.columns, padded = set.task.records * kRecordColumns;
  const int pitch = padded * 2 + kXPadBytes;
  const auto* rows =
      static_cast<const std::uint16_t*>(params.x) +
      static_cast<std::int64_t>(set.task.first_row + set.first_token) * params.x_stride;
  const bool is_aligned = params.x_stride % 8 == 0 && columns % 8 == 0 &&
                          reinterpret_cast<std::uintptr_t>(params.x) % 16 == 0;
  const int thread = static_cast<int>(threadIdx.x);
  static_assert(kChunk == kSbmmThreads * 8, "the first group of a token is a vector a thread");
  for (int k = thread * 8; k < padded || k < kChunk; k += kChunk) {
    if (k < padded) {
      const std::uint16_t* from = rows + (k < columns ? k : 0);
      unsigned char* to = place + k * 2;
      if (is_aligned) {
#pragma unroll 1
        for (int left = set.num_tokens; left > 0; --left) {
          cp_async_16(smem_address(to), from, k < columns);
          from += params.x_stride;
          to += pitch;
        }
      } else {
#pragma unroll 1
        for (int left = set.num_tokens; left > 0; --left) {
#pragma unroll 1
          for (int i = 0; i < 8; ++i) {
            reinterpret_cast<std::uint16_t*>(to)[i] = k + i < columns ? from[i] : std::uint16_t{0};
          }
          from += params.x_stride;
          to += pitch;
        }
      }
    }
    if (k < kChunk) cp_async_commit();
  }
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
template <typename T, DeltaType kType, int kParts, int kTiles>
__device__ __noinline__ void multiply_set(const SbmmSet& its_set, const SbmmLaunch& params,
                                          CtaState& cta, int turn, int sum_bytes) {
  using Half = HalfRecord<kType, kParts>;
  constexpr int kAhead = half_records_ahead(Half::kRegisters, kTiles);
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  // Uniform in the warp, and known to be to the compiler.
  const int warp = __shfl_sync(0xFFFFFFFFu, thread / 32, 0);
  const int pair = warp % kRowPairs, part = warp / kRowPairs;
  const SbmmSet set = its_set;
  const int records = set.task.records, record_bytes = set.task.record_bytes;
  const int scales_offset = set.task.scales_offset;
  const int num_blocks = set.end - set.begin;

  // The warp's steps: one record of every kColumnParts, of one row block after the other. Some
  // warps have no record in the last step of a row block.
  const int steps = (records + kColumnParts - 1) / kColumnParts;
  const int total = steps * num_blocks;
  const std::uint32_t step_bytes = kColumnParts * record_bytes;
  const std::uint32_t block_bytes = (records - kColumnParts * steps) * record_bytes;
  const LaneSource source =
      Half::source(static_cast<const unsigned char*>(set.task.data) +
                       (static_cast<std::int64_t>(set.begin) * records + part) * record_bytes,
                   scales_offset, pair, lane);
  std::uint32_t offset = 0;
  int fetch_record = part, fetches = total;
  // Values at the start, or ptxas takes them for live before the function and spills them.
  Half halves[kAhead] = {};
  const auto fetch = [&](Half& half) {
    if (fetches > 0) {
      if (fetch_record < records) half.load(source, offset);
      --fetches;
      offset += step_bytes;
      fetch_record += kColumnParts;
      if (fetch_record >= steps * kColumnParts) {
        fetch_record = part;
        offset += block_bytes;
      }
    }
  };
  static_for<kAhead>([&](auto i) { fetch(halves[i]); });

  if (turn == 0) {
    if (thread == 0) prefetch_records(set, kAhead * kColumnParts);
    griddep_wait();
  }
  // Nobody reads the x before it: who came here has passed the barrier of the last sum.
  unsigned char* x = shared + sum_bytes;
  copy_x(params, set, x);
  BlockSums<T, kTiles> sums(params, set.task, reinterpret_cast<float*>(shared), set.first_token,
                            set.num_tokens, set.begin, warp, lane);
  sums.read_output();
  if (thread == 0) cta.walk.next(params, cta.next[(turn + 1) % 2]);

  const int pitch = records * (kRecordColumns * 2) + kXPadBytes;
  // Absent tokens read the last one: columns of a product do not mix, and nobody stores theirs.
  std::uint32_t at[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int token = min(n * kTokenTile + lane % 8, set.num_tokens - 1);
    at[n] = smem_address(x) + token * pitch + lane / 8 * 16 + part * (kRecordColumns * 2);
  }
  float acc[2][kTiles][4] = {};
  cp_async_wait<1>();
  __syncthreads();
  const int rest_at = total - kChunkRecords / kColumnParts;  // steps left when the rest of x is due

  int record = part;
  for (int left = total; left > 0;) {
    static_for<kAhead>([&](auto i) {
      if (left <= 0) return;
      if (left == rest_at) {
        cp_async_wait<0>();
        __syncthreads();
      }
      --left;
      if (record < records) halves[i].template multiply<T>(acc, lane, at);
      fetch(halves[i]);
      record += kColumnParts;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) at[n] += kColumnParts * kRecordColumns * 2;
      if (record >= steps * kColumnParts) {
        record = part;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) at[n] -= steps * (kColumnParts * kRecordColumns * 2);
        static_for<2 * kTiles>([&](auto k) {
#pragma unroll
          for (float& sum : acc[k / kTiles][k % kTiles]) sum *= Words<kType>::kUnit;
        });
        sums.finish(acc);
        if (left > 0) sums.read_output();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int k = 0; k < 4; ++k) acc[r][n][k] = 0.0F;
          }
        }
      }
    });
  }
}

template <typename T, DeltaType kType, int kParts, typename... Args>
__device__ __forceinline__ void multiply_tiles(const SbmmSet& set, Args&&... args) {
  if (set.num_tokens <= kTokenTile) {
    multiply_set<T, kType, kParts, 1>(set, args...);
  } else {
    multiply_set<T, kType, kParts, kPassTokens / kTokenTile>(set, args...);
  }
}
template <typename T, DeltaType kType, typename... Args>
__device__ __forceinline__ void multiply_parts(const SbmmSet& set, Args&&... args) {
  const int scale_parts = set.task.scale_parts;
  if (scale_parts == 1) {
    multiply_tiles<T, kType, 1>(set, args...);
  } else if (scale_parts == 2 && is_sparse24(kType)) {
    multiply_tiles<T, kType, is_sparse24(kType) ? 2 : 4>(set, args...);
  } else {
    multiply_tiles<T, kType, 4>(set, args...);
  }
}
template <typename T, typename... Args>
__device__ __forceinline__ void multiply_any(const SbmmSet& set, Args&&... args) {
  switch (set.task.type) {
    case DeltaType::kSparse24Int4:
      return multiply_parts<T, DeltaType::kSparse24Int4>(set, args...);
    case DeltaType::kSparse24Int2:
      return multiply_parts<T, DeltaType::kSparse24Int2>(set, args...);
    case DeltaType::kSparse24Ternary:
      return multiply_parts<T, DeltaType::kSparse24Ternary>(set, args...);
    case DeltaType::kDenseInt4:
      return multiply_parts<T, DeltaType::kDenseInt4>(set, args...);
    case DeltaType::kDenseInt8:
      return multiply_parts<T, DeltaType::kDenseInt8>(set, args...);
    case DeltaType::kSparse14Sign:  // comes as ternary
      return;
  }
}

template <typename T>
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
    multiply_any<T>(*set, params, cta, turn, sum_bytes);
  }
}

}  // namespace deltazip::cuda
