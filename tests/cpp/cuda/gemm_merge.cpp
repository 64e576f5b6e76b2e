// When W + delta, written out and multiplied once, beats a base and a sparse product.

#include <algorithm>
#include <cstdio>
#include <optional>
#include <random>

#include "cuda/gemm_check.h"
#include "cuda/sbmm_cases.h"

namespace deltazip::cuda::check {
namespace {

constexpr std::int64_t kMostTokens = 2048;
constexpr int kLaunches = 6;  // on different weights and deltas, so that L2 holds none of them

struct Case {
  Case(Shape shape_in, DeltaType type, int num_sms_in, std::mt19937_64& rng)
      : shape(shape_in),
        num_sms(num_sms_in),
        delta(type, shape.out, shape.in, 128, rng, false),
        weight_bytes(2 * static_cast<std::size_t>(shape.in * shape.out)),
        weights(kLaunches * weight_bytes),
        merged(weight_bytes),
        x(2 * static_cast<std::size_t>(kMostTokens * shape.in)),
        y(2 * static_cast<std::size_t>(kMostTokens * shape.out)),
        fixed_x(static_cast<std::size_t>(kMostTokens * fixed_point_row(shape.in).num_bytes)) {
    const std::vector<std::uint8_t> tiled = delta.tile();
    pitch = (tiled.size() + 255) / 256 * 256;
    deltas.emplace(kLaunches * pitch);
    for (std::size_t i = 0; i < kLaunches; ++i) {
      DZ_CUDA(
          cudaMemcpy(deltas->get(i * pitch), tiled.data(), tiled.size(), cudaMemcpyHostToDevice));
    }
  }
  DeltaMatrix matrix(std::size_t i) const {
    return {deltas->get<std::byte>(i * pitch), delta.type, delta.group_size, delta.rows,
            delta.columns};
  }

  Shape shape;
  int num_sms;
  bench::RandomDelta delta;
  std::size_t weight_bytes, pitch = 0;
  Memory weights, merged, x, y, fixed_x;
  std::optional<Memory> deltas;
};

// SBMM of one task that is all rows.
class Sparse {
 public:
  Sparse(const Case& c, std::int64_t tokens) : c_(c) {
    plans_.resize(kLaunches);
    for (std::size_t i = 0; i < kLaunches; ++i) {
      SbmmTask task;
      task.delta = c.matrix(i);
      task.num_rows = static_cast<std::int32_t>(tokens);
      make_sbmm_plan(plans_[i], {&task, 1}, c.num_sms * kCtasPerSm);
      tasks_.insert(tasks_.end(), plans_[i].tasks.begin(), plans_[i].tasks.end());
      ranges_.insert(ranges_.end(), plans_[i].ranges.begin(), plans_[i].ranges.end());
    }
    device_tasks_.emplace(tasks_.size() * sizeof(SbmmDeviceTask));
    device_ranges_.emplace(ranges_.size() * sizeof(SbmmCtaRange));
    DZ_CUDA(cudaMemcpy(device_tasks_->get(), tasks_.data(), device_tasks_->num_bytes(),
                       cudaMemcpyHostToDevice));
    DZ_CUDA(cudaMemcpy(device_ranges_->get(), ranges_.data(), device_ranges_->num_bytes(),
                       cudaMemcpyHostToDevice));
  }
  void run(std::size_t i, cudaStream_t stream) const {
    const std::size_t num_ctas = plans_[i].ranges.size();
    launch_fixed_point({.x = c_.x.get(),
                        .out = c_.fixed_x.get(),
                        .num_rows = plans_[i].tasks[0].num_rows,
                        .columns = c_.shape.in,
                        .x_stride = c_.shape.in,
                        .dtype = DType::kFloat16},
                       stream);
    launch_sbmm({.x = c_.fixed_x.get(),
                 .y = c_.y.get(),
                 .tasks = device_tasks_->get<SbmmDeviceTask>() + i,
                 .ranges = device_ranges_->get<SbmmCtaRange>() + i * num_ctas,
                 .x_row_bytes = fixed_point_row(c_.shape.in).num_bytes,
                 .y_stride = c_.shape.out,
                 .num_ctas = static_cast<std::int32_t>(num_ctas),
                 .y_dtype = DType::kFloat16},
                stream);
  }

 private:
  const Case& c_;
  std::vector<SbmmPlan> plans_;
  std::vector<SbmmDeviceTask> tasks_;
  std::vector<SbmmCtaRange> ranges_;
  std::optional<Memory> device_tasks_, device_ranges_;
};

}  // namespace

void time_merges(CublasLt& lt, int num_sms, cudaStream_t stream) {
  constexpr Shape kShapes[] = {{4096, 4096}, {4096, 12288}, {4096, 22016}, {11008, 4096}};
  constexpr DeltaType kTypes[] = {DeltaType::kSparse24Int4, DeltaType::kSparse24Int2,
                                  DeltaType::kSparse24Ternary};
  std::mt19937_64 rng(1);
  std::printf("\none segment, fp16, us: base + sparse product / add_delta + product\n%-30s",
              "K x N, type");
  constexpr std::int64_t kTokens[] = {64, 128, 256, 384, 512, 640, 768, 1024, 2048};
  for (const std::int64_t tokens : kTokens) {
    std::printf(" %13lld", static_cast<long long>(tokens));
  }
  std::printf("\n");
  for (const Shape shape : kShapes) {
    for (const DeltaType type : kTypes) {
      const Case c(shape, type, num_sms, rng);
      fill(c.weights.get(), c.weights.num_bytes() / 2, DType::kFloat16, 0.02F, 3, stream);
      fill(c.x.get(), c.x.num_bytes() / 2, DType::kFloat16, 0.1F, 4, stream);
      DZ_CUDA(cudaStreamSynchronize(stream));
      std::printf("%5lldx%-6lld %-17s", static_cast<long long>(shape.in),
                  static_cast<long long>(shape.out), name(type).data());
      for (const std::int64_t tokens : kTokens) {
        const auto multiply = [&](const void* weight, LtChoice choice) {
          DZ_INTERNAL(lt.run({c.x.get(), weight, c.y.get(), tokens, shape.in, shape.out, shape.out,
                              DType::kFloat16, DType::kFloat16},
                             choice, stream),
                      "cuBLASLt has no algorithm");
        };
        multiply(c.weights.get(), LtChoice::kMeasure);
        const Sparse sparse(c, tokens);
        const auto us = [&](const auto& once) {
          return graph_us(
                     [&] {
                       for (std::size_t i = 0; i < kLaunches; ++i) once(i);
                     },
                     stream, 5) /
                 kLaunches;
        };
        const double apart = us([&](std::size_t i) {
          multiply(c.weights.get(i * c.weight_bytes), LtChoice::kFirst);
          sparse.run(i, stream);
        });
        const double merged = us([&](std::size_t i) {
          launch_add_delta(
              {c.weights.get(i * c.weight_bytes), c.matrix(i), c.merged.get(), DType::kFloat16},
              stream);
          multiply(c.merged.get(), LtChoice::kFirst);
        });
        std::printf(" %5.0f / %5.0f", apart, merged);
        std::fflush(stdout);
      }
      std::printf("\n");
    }
  }
}

}  // namespace deltazip::cuda::check
