#pragma once

// SBMM: one persistent launch for all tasks. A CTA walks its items (plan.h) set by set; its groups
// take turns at the row blocks of a set. Records go straight from memory to the registers of the
// warp that multiplies them, several half records ahead; only x lies in shared memory.

#include "backend/cuda/kernels/device/bulk_copy.cuh"
#include "backend/cuda/kernels/device/cp_async.cuh"
#include "backend/cuda/kernels/device/pdl.cuh"
#include "backend/cuda/kernels/device/smem.cuh"
#include "backend/cuda/kernels/sbmm/fragments.cuh"
#include "backend/cuda/kernels/sbmm/output.cuh"
#include "backend/cuda/kernels/sbmm/sbmm.h"

namespace deltazip::cuda {

// A piece of tokens of a task, and the CTA's row blocks of it.
struct XSet {
  SbmmDeviceTask task;
  int first_token, num_tokens;  // within the task
  int begin, end;               // row blocks
};

// The sets of a CTA, one after the other.
class SetWalk {
 public:
  __device__ explicit SetWalk(const SbmmCtaRange& range)
      : index_(range.first_task),
        item_(range.first_item),
        last_task_(range.last_task),
        last_item_(range.last_item) {
    set_.task = range.task;
  }

  // Goes to the next set; false when there is none.
  __device__ __forceinline__ bool next(const SbmmLaunch& params) {
    while (item_ >= end_item()) {
      if (index_ >= last_task_) return false;
      ++index_;
      item_ = 0;
      set_.task = params.tasks[index_];
    }
    const SbmmDeviceTask& task = set_.task;
    const int piece = item_ / task.row_blocks;
    set_.first_token = piece * task.piece_tokens;
    set_.num_tokens = min(task.piece_tokens, task.num_rows - set_.first_token);
    set_.begin = item_ - piece * task.row_blocks;
    set_.end = min(set_.begin + end_item() - item_, task.row_blocks);
    item_ += set_.end - set_.begin;
    return true;
  }
  __device__ const XSet& set() const { return set_; }

 private:
  __device__ int end_item() const {
    return index_ == last_task_ ? last_item_ : set_.task.num_items;
  }

  int index_, item_, last_task_, last_item_;
  XSet set_;
};

// x of a set to shared memory, [token][columns, zeros up to whole records], by all threads. The
// caller waits for the copies.
__device__ __forceinline__ void copy_x(const SbmmLaunch& params, const XSet& set,
                                       unsigned char* place) {
  const int columns = set.task.columns, padded = set.task.records * kRecordColumns;
  const int pitch = padded * 2 + kXPadBytes;
  const auto* rows =
      static_cast<const std::uint16_t*>(params.x) +
      static_cast<std::int64_t>(set.task.first_row + set.first_token) * params.x_stride;
  const bool is_aligned = params.x_stride % 8 == 0 && columns % 8 == 0 &&
                          reinterpret_cast<std::uintptr_t>(params.x) % 16 == 0;
  const int thread = static_cast<int>(threadIdx.x);
  const std::uint32_t to = smem_address(place);
  for (int token = 0; token < set.num_tokens; ++token) {
    const std::uint16_t* row = rows + token * params.x_stride;
    if (is_aligned) {
#pragma unroll 2
      for (int k = thread * 8; k < padded; k += kSbmmThreads * 8) {
        const bool is_valid = k < columns;
        cp_async_16(to + token * pitch + k * 2, row + (is_valid ? k : 0), is_valid);
      }
    } else {
      auto* halves = reinterpret_cast<std::uint16_t*>(place + token * pitch);
      for (int k = thread; k < padded; k += kSbmmThreads) {
        halves[k] = k < columns ? row[k] : std::uint16_t{0};
      }
    }
  }
  cp_async_commit();
}

// Where a CTA stands between its sets.
struct CtaState {
  const SbmmLaunch& params;
  int sum_bytes, x_buffers, x_bytes;
  SetWalk walk;  // at the set whose x comes next
  bool is_first, has_next;
  int buffer;         // of x
  int blocks_before;  // row blocks in sets before: the groups' turns go on over sets
  XSet set;           // at hand
  std::uint32_t x;    // its x
};

// The first records of both groups towards L2, while the CTA waits for x.
__device__ __forceinline__ void prefetch_records(const CtaState& cta) {
  const XSet& set = cta.set;
  const int num_bytes = min(set.task.records, kPrefetchedRecords) * set.task.record_bytes;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int block = set.begin + static_cast<int>(threadIdx.x) / kGroupThreads;
  if (block >= set.end) return;
  const auto* from = static_cast<const unsigned char*>(set.task.data) +
                     static_cast<std::int64_t>(block) * set.task.records * set.task.record_bytes;
  for (int at = thread * 128; at < num_bytes; at += kGroupThreads * 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
  }
}

// All threads: goes to the next set, waits for its x and sends for that of the set after it.
__device__ __forceinline__ void begin_set(CtaState& cta) {
  extern __shared__ __align__(128) unsigned char shared[];
  cta.set = cta.walk.set();
  prefetch_records(cta);
  unsigned char* x = shared + cta.sum_bytes + cta.buffer * cta.x_bytes;
  if (cta.is_first) {
    griddep_wait();
    copy_x(cta.params, cta.set, x);
    cta.is_first = false;
  } else if (cta.x_buffers == 1) {
    __syncthreads();
    copy_x(cta.params, cta.set, x);
  }
  cp_async_wait<0>();
  __syncthreads();
  cta.x = smem_address(x);
  cta.has_next = cta.walk.next(cta.params);
  if (cta.x_buffers == 2) {
    cta.buffer ^= 1;
    if (cta.has_next) {
      copy_x(cta.params, cta.walk.set(), shared + cta.sum_bytes + cta.buffer * cta.x_bytes);
    }
  }
}

// A set with its task's format as constants. A function of its own, so that each format has its own
// registers.
template <typename T, DeltaType kType, int kParts, int kTiles>
__device__ __noinline__ void multiply_set(CtaState& cta) {
  using Half = HalfRecord<kType, kParts>;
  constexpr int kAhead = half_records_ahead(Half::kRegisters, kTiles);
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  // Uniform in the warp, and known to be to the compiler.
  const int group = __shfl_sync(0xFFFFFFFFu, thread / kGroupThreads, 0);
  const int warp = __shfl_sync(0xFFFFFFFFu, thread % kGroupThreads / 32, 0);
  const int pair = warp % kRowPairs, part = warp / kRowPairs;
  const XSet set = cta.set;
  const int records = set.task.records, record_bytes = set.task.record_bytes;
  const int scales_offset = set.task.scales_offset;
  const int begin = set.begin + ((group + cta.blocks_before) & (kGroups - 1));
  const int num_blocks = set.end > begin ? (set.end - begin + kGroups - 1) / kGroups : 0;
  cta.blocks_before += set.end - set.begin;

  // The warp's steps: one record of every kColumnParts, of one row block after the other. Some
  // warps have no record in the last step of a row block.
  const int steps = (records + kColumnParts - 1) / kColumnParts;
  const int total = steps * num_blocks;
  const int step_bytes = kColumnParts * record_bytes;
  const int block_bytes = (kGroups * records - kColumnParts * steps) * record_bytes;
  const std::uint64_t policy = policy_evict_first();
  const unsigned char* from = static_cast<const unsigned char*>(set.task.data) +
                              (static_cast<std::int64_t>(begin) * records + part) * record_bytes;
  int fetch_record = part, fetches = total;
  // Values at the start, or ptxas takes them for live before the function and spills them.
  Half halves[kAhead] = {};
  const auto fetch = [&](Half& half) {
    if (fetches > 0) {
      if (fetch_record < records) half.load(from, scales_offset, pair, lane, policy);
      --fetches;
      from += step_bytes;
      fetch_record += kColumnParts;
      if (fetch_record >= steps * kColumnParts) {
        fetch_record = part;
        from += block_bytes;
      }
    }
  };
  static_for<kAhead>([&](auto i) { fetch(halves[i]); });

  const std::uint32_t x = cta.x;
  const int pitch = records * (kRecordColumns * 2) + kXPadBytes;
  // Absent tokens read the last one: columns of a product do not mix, and nobody stores theirs.
  std::uint32_t at[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int token = min(n * kTokenTile + lane % 8, set.num_tokens - 1);
    at[n] = x + token * pitch + lane / 8 * 16 + part * (kRecordColumns * 2);
  }
  BlockSums<T, kTiles> sums(cta.params, set.task,
                            reinterpret_cast<float*>(shared + group * (cta.sum_bytes / kGroups)),
                            set.first_token, set.num_tokens, begin, group, warp, lane);
  if (num_blocks > 0) sums.read_output();
  float acc[2][kTiles][4] = {};
  int record = part;
  for (int left = total; left > 0;) {
    static_for<kAhead>([&](auto i) {
      if (left <= 0) return;
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

template <typename T, DeltaType kType, int kParts>
__device__ __forceinline__ void multiply_tiles(CtaState& cta) {
  if (cta.set.num_tokens <= kTokenTile) {
    multiply_set<T, kType, kParts, 1>(cta);
  } else {
    multiply_set<T, kType, kParts, kPassTokens / kTokenTile>(cta);
  }
}
template <typename T, DeltaType kType>
__device__ __forceinline__ void multiply_parts(CtaState& cta) {
  const int scale_parts = cta.set.task.scale_parts;
  if (scale_parts == 1) {
    multiply_tiles<T, kType, 1>(cta);
  } else if (scale_parts == 2 && is_sparse24(kType)) {
    multiply_tiles<T, kType, is_sparse24(kType) ? 2 : 4>(cta);
  } else {
    multiply_tiles<T, kType, 4>(cta);
  }
}
template <typename T>
__device__ __forceinline__ void multiply_any(CtaState& cta) {
  switch (cta.set.task.type) {
    case DeltaType::kSparse24Int4:
      return multiply_parts<T, DeltaType::kSparse24Int4>(cta);
    case DeltaType::kSparse24Int2:
      return multiply_parts<T, DeltaType::kSparse24Int2>(cta);
    case DeltaType::kSparse24Ternary:
      return multiply_parts<T, DeltaType::kSparse24Ternary>(cta);
    case DeltaType::kDenseInt4:
      return multiply_parts<T, DeltaType::kDenseInt4>(cta);
    case DeltaType::kDenseInt8:
      return multiply_parts<T, DeltaType::kDenseInt8>(cta);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSbmmThreads, 1) sbmm_kernel(const SbmmLaunch params) {
  griddep_launch();
  const SbmmCtaRange range = params.ranges[blockIdx.x];
  CtaState cta{params,
               range.sum_bytes,
               range.x_buffers,
               range.x_bytes,
               SetWalk(range),
               true,
               false,
               0,
               0,
               {},
               0};
  cta.has_next = cta.walk.next(params);
  while (cta.has_next) {
    begin_set(cta);
    multiply_any<T>(cta);
  }
  // A CTA without work must not end before the launch's predecessors, or it would overtake them.
  if (cta.is_first) griddep_wait();
}

}  // namespace deltazip::cuda
