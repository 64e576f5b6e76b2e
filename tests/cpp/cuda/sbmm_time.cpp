// SBMM's time in a CUDA graph of many launches over deltas that do not fit L2.

#include <algorithm>
#include <cmath>

#include "cuda/sbmm_cases.h"
#include "deltazip/base/dtype.h"

namespace deltazip::bench {
namespace {

constexpr int kLaunches = 24;
constexpr double kRotatedBytes = 160e6;

struct TiledDelta : RandomDelta {
  TiledDelta(DeltaType type, std::int64_t rows, std::int64_t columns, std::int32_t group_size,
             std::mt19937_64& rng)
      : RandomDelta(type, rows, columns, group_size, rng, false), tiled(tile()) {}
  std::vector<std::uint8_t> tiled;
};

struct Timing {
  double us;
  double bytes;  // of active deltas
};

class Timer {
 public:
  Timer() {
    DZ_CUDA(cudaStreamCreate(&stream_));
    DZ_CUDA(cudaEventCreate(&begin_));
    DZ_CUDA(cudaEventCreate(&end_));
    int device = 0;
    DZ_CUDA(cudaGetDevice(&device));
    DZ_CUDA(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device));
  }

  // Launches of num_deltas deltas of `tokens` rows each; num_deltas 0: enough for `wanted` bytes.
  Timing run(const TiledDelta& delta, int tokens, int num_deltas, double wanted, DType dtype) {
    const std::vector<std::uint8_t>& host = delta.tiled;
    const auto size = static_cast<double>(host.size());
    if (num_deltas == 0) num_deltas = std::max(1, static_cast<int>(std::lround(wanted / size)));
    const int pool = std::max(num_deltas, static_cast<int>(std::ceil(kRotatedBytes / size)));
    const std::size_t pitch = (host.size() + 255) / 256 * 256;
    DeviceBytes bytes(pitch * static_cast<std::size_t>(pool));
    for (int i = 0; i < pool; ++i) {
      DZ_CUDA(cudaMemcpy(bytes.as<unsigned char>() + pitch * static_cast<std::size_t>(i),
                         host.data(), host.size(), cudaMemcpyHostToDevice));
    }
    const std::int64_t rows = std::int64_t{tokens} * num_deltas;
    std::mt19937_64 rng(3);
    std::vector<std::uint16_t> x(static_cast<std::size_t>(rows * delta.columns));
    for (auto& v : x) {
      const float value = static_cast<float>(rng() % 2048) / 1024.0F - 1.0F;
      v = dtype == DType::kFloat16 ? to_half(value).bits : to_bfloat16(value).bits;
    }
    DeviceBytes x_device(x.size() * 2), y(static_cast<std::size_t>(rows * delta.rows) * 2);
    x_device.upload(x);
    DZ_CUDA(cudaMemset(y.as<void>(), 0, static_cast<std::size_t>(rows * delta.rows) * 2));
    std::vector<cuda::SbmmPlan> plans(kLaunches);
    int next = 0;
    for (cuda::SbmmPlan& plan : plans) {
      std::vector<SbmmTask> tasks;
      for (int i = 0; i < num_deltas; ++i, next = (next + 1) % pool) {
        SbmmTask task;
        task.delta = {bytes.as<unsigned char>() + pitch * static_cast<std::size_t>(next),
                      delta.type, delta.group_size, delta.rows, delta.columns};
        task.first_row = i * tokens;
        task.num_rows = tokens;
        tasks.push_back(task);
      }
      cuda::make_sbmm_plan(plan, tasks, num_sms_);
    }
    std::vector<cuda::SbmmDeviceTask> tasks;
    std::vector<cuda::SbmmCtaRange> ranges;
    for (const cuda::SbmmPlan& plan : plans) {
      tasks.insert(tasks.end(), plan.tasks.begin(), plan.tasks.end());
      ranges.insert(ranges.end(), plan.ranges.begin(), plan.ranges.end());
    }
    DeviceBytes task_bytes(tasks.size() * sizeof(tasks[0])),
        range_bytes(ranges.size() * sizeof(ranges[0]));
    task_bytes.upload(tasks);
    range_bytes.upload(ranges);

    DZ_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kLaunches; ++i) {
      cuda::SbmmLaunch launch{};
      launch.x = x_device.as<void>();
      launch.y = y.as<void>();
      launch.tasks = task_bytes.as<cuda::SbmmDeviceTask>() + i * num_deltas;
      launch.ranges = range_bytes.as<cuda::SbmmCtaRange>() + i * num_sms_;
      launch.x_stride = delta.columns;
      launch.y_stride = delta.rows;
      launch.num_ctas = num_sms_;
      launch.dtype = launch.y_dtype = dtype;
      cuda::launch_sbmm(launch, stream_);
    }
    cudaGraph_t graph;
    cudaGraphExec_t instance;
    DZ_CUDA(cudaStreamEndCapture(stream_, &graph));
    DZ_CUDA(cudaGraphInstantiate(&instance, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < 9; ++i) {
      DZ_CUDA(cudaEventRecord(begin_, stream_));
      DZ_CUDA(cudaGraphLaunch(instance, stream_));
      DZ_CUDA(cudaEventRecord(end_, stream_));
      DZ_CUDA(cudaEventSynchronize(end_));
      float ms = 0;
      DZ_CUDA(cudaEventElapsedTime(&ms, begin_, end_));
      if (i >= 2) times.push_back(ms);
    }
    DZ_CUDA(cudaGraphExecDestroy(instance));
    DZ_CUDA(cudaGraphDestroy(graph));
    std::sort(times.begin(), times.end());
    return {times[times.size() / 2] * 1e3 / kLaunches, size * num_deltas};
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
  int num_sms_ = 0;
};

}  // namespace

void time_sbmm(TimedCases cases) {
  struct Shape {
    std::int64_t columns, rows;
  };
  const double stream = read_bandwidth();
  Timer timer;
  std::mt19937_64 rng(1);
  printf("%-17s %5s x %-5s %4s %3s %4s %7s %8s %7s %6s\n", "type", "K", "N", "g", "t", "D", "MB",
         "us", "GB/s", "share");
  const auto line = [&](const TiledDelta& delta, int tokens, int num_deltas, double wanted,
                        DType dtype) {
    const Timing timing = timer.run(delta, tokens, num_deltas, wanted, dtype);
    const double size = static_cast<double>(
        cuda::tiled_delta_bytes(delta.type, delta.rows, delta.columns, delta.group_size));
    printf("%-17s %5ld x %-5ld %4d %3d %4d %7.1f %8.1f %7.0f %5.1f%%%s\n", name(delta.type).data(),
           delta.columns, delta.rows, delta.group_size, tokens,
           static_cast<int>(std::lround(timing.bytes / size)), timing.bytes / 1e6, timing.us,
           timing.bytes / timing.us / 1e3, timing.bytes / timing.us / 1e4 / stream,
           dtype == DType::kBFloat16 ? " bf16" : "");
  };
  if (cases == TimedCases::kAnchors) {
    for (const Shape shape : {Shape{4096, 4096}, Shape{4096, 11008}, Shape{11008, 4096}}) {
      for (int type = 0; type < 3; ++type) {
        const TiledDelta delta(static_cast<DeltaType>(type), shape.rows, shape.columns, 128, rng);
        for (const int num_deltas : {1, 2, 8, 32}) line(delta, 1, num_deltas, 0, DType::kFloat16);
        for (const int tokens : {8, 16, 32}) line(delta, tokens, 32, 0, DType::kFloat16);
      }
    }
    return;
  }
  for (const Shape shape :
       {Shape{4096, 4096}, Shape{4096, 12288}, Shape{4096, 22016}, Shape{11008, 4096}}) {
    for (int type = 0; type < 3; ++type) {
      for (const std::int32_t group : {128, 64}) {
        const TiledDelta delta(static_cast<DeltaType>(type), shape.rows, shape.columns, group, rng);
        for (const double wanted : {20e6, 50e6, 125e6}) {
          line(delta, 1, 0, wanted, DType::kFloat16);
          line(delta, 8, 0, wanted, DType::kFloat16);
          if (group == 64 || shape.rows == 12288) continue;
          line(delta, 16, 0, wanted, DType::kFloat16);
          if (wanted > 60e6) line(delta, 32, 0, wanted, DType::kFloat16);
          if (wanted > 60e6) line(delta, 8, 0, wanted, DType::kBFloat16);
        }
      }
    }
  }
}

}  // namespace deltazip::bench
