// Projections: base products and the deltas of a batch.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "backend/cuda/base_product.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/cuda_ops.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/kernels/sbmm/fixed_point.h"
#include "backend/cuda/kernels/sbmm/sbmm.h"
#include "backend/cuda/merge_plan.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

// From here on writing W + delta out and one dense product cost less than a sparse product beside
// the base one: measured, the products of a layer are even at 170 to 185 rows, whatever the type.
constexpr std::int32_t kMergeRows = 176;
static_assert(kMergeRows > BaseProduct::kMaxStreamTokens, "the merged weight is just written");
// Gate and up of the Llama-3-8B shape are 235 MB, of Llama-2-13B 283 MB.
constexpr std::size_t kMergeBytes = std::size_t{288} << 20;

const void* advance(const void* pointer, std::int64_t num_bytes) {
  return static_cast<const std::byte*>(pointer) + num_bytes;
}
void* advance(void* pointer, std::int64_t num_bytes) {
  return static_cast<std::byte*>(pointer) + num_bytes;
}

std::int64_t bytes_of(DType dtype) { return static_cast<std::int64_t>(size_of(dtype)); }

// Rows [first, first + count) of a product.
LinearParams rows_of(const LinearParams& all, std::int64_t first, std::int64_t count) {
  LinearParams some = all;
  some.x = advance(all.x, first * all.weight.columns * bytes_of(all.dtype));
  some.y = advance(all.y, first * all.weight.rows * bytes_of(all.y_dtype));
  some.num_rows = count;
  return some;
}

// The same of SBMM, its tasks cut to those rows and put into `tasks`.
SbmmParams rows_of(const SbmmParams& all, std::int64_t first, std::int64_t count,
                   std::vector<SbmmTask>& tasks) {
  SbmmParams some = all;
  some.x = advance(all.x, first * all.in_features * bytes_of(all.dtype));
  some.y = advance(all.y, first * all.out_features * bytes_of(all.y_dtype));
  some.num_rows = count;
  tasks.assign(all.tasks, all.tasks + all.num_tasks);
  for (SbmmTask& task : tasks) {
    const std::int64_t begin = std::max<std::int64_t>(task.first_row - first, 0);
    const std::int64_t end = std::min(task.first_row + task.num_rows - first, count);
    task.first_row = static_cast<std::int32_t>(begin);
    task.num_rows = static_cast<std::int32_t>(std::max<std::int64_t>(end - begin, 0));
  }
  some.tasks = tasks.data();
  return some;
}

bool is_mergeable(const SbmmTask& task) {
  return task.delta.data != nullptr && task.num_rows >= kMergeRows &&
         static_cast<std::size_t>(task.delta.rows * task.delta.columns) * 2 <= kMergeBytes;
}

}  // namespace

struct CudaOps::ProjectState {
  explicit ProjectState(const DeviceInfo& info)
      : merged(kMergeBytes),
        base(info.num_sms, {static_cast<const std::byte*>(merged.data()), merged.num_bytes()}) {}

  // A step's plans live side by side, since StepArgs knows an array by its address.
  SbmmPlan& next_plan(const StepArgs& args) {
    if (args.pass() != pass) {
      pass = args.pass();
      num_plans = 0;
    }
    if (num_plans == plans.size()) plans.push_back(std::make_unique<SbmmPlan>());
    return *plans[num_plans++];
  }

  // How many rows of x fit as fixed point. They lie where merged weights do, which no kernel reads
  // any more when launch_fixed_point() writes there.
  std::int64_t max_sparse_rows(std::int64_t columns) const {
    const std::int64_t row_bytes = fixed_point_row(columns).num_bytes;
    const auto count = static_cast<std::int64_t>(merged.num_bytes()) / row_bytes;
    DZ_CHECK(count > 0, "cuda: a row of x may have ", merged.num_bytes(),
             " bytes in fixed point, got ", columns, " columns, ", row_bytes, " bytes");
    return count;
  }
  void make_fixed_point(const SbmmParams& params, cudaStream_t stream) {
    launch_fixed_point({.x = params.x,
                        .out = merged.data(),
                        .num_rows = params.num_rows,
                        .columns = params.in_features,
                        .x_stride = params.in_features,
                        .dtype = params.dtype},
                       stream);
  }

  // Rows of one segment by W + delta. Columns that no task covers are the base's.
  void multiply_merged(const LinearParams& rows, std::span<const SbmmTask> tasks,
                       cudaStream_t stream);

  DeviceMemory merged;
  BaseProduct base;
  std::vector<std::unique_ptr<SbmmPlan>> plans;
  std::size_t num_plans = 0;
  std::int64_t pass = -1;
};

void CudaOps::ProjectState::multiply_merged(const LinearParams& rows,
                                            std::span<const SbmmTask> tasks, cudaStream_t stream) {
  const PackedMatrix& weight = rows.weight;
  const std::int64_t row_bytes = weight.columns * bytes_of(weight.dtype);
  const auto base_rows = [&](std::int64_t first) {
    return advance(weight.data, first * row_bytes);
  };
  const auto multiply = [&](const void* some_weight, std::int64_t first, std::int64_t count) {
    base.run({rows.x, some_weight, advance(rows.y, first * bytes_of(rows.y_dtype)), rows.num_rows,
              weight.columns, count, weight.rows, rows.dtype, rows.y_dtype},
             true, stream);
  };
  const auto add = [&](const SbmmTask& task, void* out) {
    launch_add_delta({base_rows(task.out_offset), task.delta, out, weight.dtype}, stream);
  };
  const bool is_one_product =
      static_cast<std::size_t>(weight.rows * row_bytes) <= merged.num_bytes();
  std::int64_t next = 0;  // the first out row not yet seen to
  const auto base_until = [&](std::int64_t end) {
    if (end == next) return;
    if (is_one_product) {
      DZ_CUDA(cudaMemcpyAsync(advance(merged.data(), next * row_bytes), base_rows(next),
                              static_cast<std::size_t>((end - next) * row_bytes),
                              cudaMemcpyDeviceToDevice, stream));
    } else {
      multiply(base_rows(next), next, end - next);
    }
  };
  for (const SbmmTask& task : tasks) {
    base_until(task.out_offset);
    next = task.out_offset + task.delta.rows;
    if (is_one_product) {
      add(task, advance(merged.data(), task.out_offset * row_bytes));
    } else {
      add(task, merged.data());
      multiply(merged.data(), task.out_offset, task.delta.rows);
    }
  }
  base_until(weight.rows);
  if (is_one_product) multiply(merged.data(), 0, weight.rows);
}

std::shared_ptr<CudaOps::ProjectState> CudaOps::make_project_state() {
  return std::make_shared<ProjectState>(info_);
}

void CudaOps::run(const LinearParams& params, Stream& stream) {
  DZ_CHECK(params.dtype == info_.compute_dtype && params.weight.dtype == info_.compute_dtype,
           "cuda: x and the weight of a product must be ", name(info_.compute_dtype), ", got ",
           name(params.dtype), " and ", name(params.weight.dtype));
  if (!args_.launching()) return;
  project_->base.run(
      {params.x, params.weight.data, params.y, params.num_rows, params.weight.columns,
       params.weight.rows, params.weight.rows, params.dtype, params.y_dtype},
      !args_.is_recorded(), to_cuda(stream).get());
}

void CudaOps::run(const SbmmParams& params, Stream& stream) {
  DZ_CHECK(params.dtype == info_.compute_dtype, "cuda: x of sbmm must be ",
           name(info_.compute_dtype), ", got ", name(params.dtype));
  const std::int64_t most = project_->max_sparse_rows(params.in_features);
  std::vector<SbmmTask> tasks;
  for (std::int64_t first = 0; first < params.num_rows; first += most) {
    const SbmmParams some = rows_of(params, first, std::min(most, params.num_rows - first), tasks);
    if (args_.launching()) project_->make_fixed_point(some, to_cuda(stream).get());
    multiply_sparse(some, stream);
  }
}

void CudaOps::multiply_sparse(const SbmmParams& params, Stream& stream) {
  CudaStream& queue = to_cuda(stream);
  SbmmPlan& plan = project_->next_plan(args_);
  make_sbmm_plan(plan, {params.tasks, static_cast<std::size_t>(params.num_tasks)},
                 info_.num_sms * kCtasPerSm);
  const SbmmLaunch sbmm{.x = project_->merged.data(),
                        .y = params.y,
                        .tasks = args_.put(std::span<const SbmmDeviceTask>(plan.tasks), queue),
                        .ranges = args_.put(std::span<const SbmmCtaRange>(plan.ranges), queue),
                        .x_row_bytes = fixed_point_row(params.in_features).num_bytes,
                        .y_stride = params.out_features,
                        .num_ctas = static_cast<std::int32_t>(plan.ranges.size()),
                        .y_dtype = params.y_dtype};
  if (args_.launching()) launch_sbmm(sbmm, queue.get());
}

void CudaOps::run(const ProjectParams& params, Stream& stream) {
  const std::span<const SbmmTask> tasks{params.deltas.tasks,
                                        static_cast<std::size_t>(params.deltas.num_tasks)};
  // What a recorded step launches may not depend on whose rows they are.
  const bool merges = !args_.is_recorded() && std::ranges::any_of(tasks, is_mergeable);
  if (!merges) {
    // Before the base product, which has bytes to fetch meanwhile; after it, one would wait for x.
    const bool is_one_launch =
        !tasks.empty() &&
        params.base.num_rows <= project_->max_sparse_rows(params.deltas.in_features);
    if (is_one_launch && args_.launching()) {
      project_->make_fixed_point(params.deltas, to_cuda(stream).get());
    }
    run(params.base, stream);
    if (is_one_launch) {
      multiply_sparse(params.deltas, stream);
    } else if (!tasks.empty()) {
      run(params.deltas, stream);
    }
    return;
  }
  const MergePlan plan = plan_merges(tasks, params.base.num_rows, is_mergeable);
  for (const MergePlan::Rows& rows : plan.base) {
    run(rows_of(params.base, rows.first, rows.count), stream);
  }
  for (const MergePlan::Segment& segment : plan.merged) {
    if (!args_.launching()) break;
    project_->multiply_merged(rows_of(params.base, segment.first_row, segment.num_rows),
                              segment.tasks, to_cuda(stream).get());
  }
  if (plan.sparse.empty()) return;
  SbmmParams sparse = params.deltas;
  sparse.tasks = plan.sparse.data();
  sparse.num_tasks = static_cast<std::int32_t>(plan.sparse.size());
  run(sparse, stream);
}

}  // namespace deltazip::cuda
