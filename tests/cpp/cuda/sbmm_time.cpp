// SBMM's time in a CUDA graph of many launches over deltas that do not fit L2: alone, or each after
// the base product of the same rows.

#include <algorithm>
#include <cmath>
#include <functional>

#include "backend/cuda/kernels/base_gemm/base_gemm.h"
#include "cuda/sbmm_cases.h"
#include "deltazip/base/dtype.h"

namespace deltazip::bench {
namespace {

constexpr int kLaunches = 24;
constexpr double kRotatedBytes = 160e6;

struct Shape {
  std::int64_t columns, rows;
};
constexpr Shape kShapes[] = {{4096, 4096}, {4096, 12288}, {4096, 22016}, {11008, 4096}};

int count_sms() {
  int device = 0, num_sms = 0;
  DZ_CUDA(cudaGetDevice(&device));
  DZ_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  return num_sms;
}

// Microseconds of one of kLaunches calls of launch(i, stream), recorded in a graph; median of 7.
double time_launches(const std::function<void(int, cudaStream_t)>& launch) {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  DZ_CUDA(cudaStreamCreate(&stream));
  DZ_CUDA(cudaEventCreate(&begin));
  DZ_CUDA(cudaEventCreate(&end));
  cudaGraph_t graph;
  cudaGraphExec_t instance;
  DZ_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kLaunches; ++i) launch(i, stream);
  DZ_CUDA(cudaStreamEndCapture(stream, &graph));
  DZ_CUDA(cudaGraphInstantiate(&instance, graph, 0));
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    DZ_CUDA(cudaEventRecord(begin, stream));
    DZ_CUDA(cudaGraphLaunch(instance, stream));
    DZ_CUDA(cudaEventRecord(end, stream));
    DZ_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    DZ_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms);
  }
  DZ_CUDA(cudaGraphExecDestroy(instance));
  DZ_CUDA(cudaGraphDestroy(graph));
  DZ_CUDA(cudaEventDestroy(begin));
  DZ_CUDA(cudaEventDestroy(end));
  DZ_CUDA(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e3 / kLaunches;
}

// Copies of one delta, more than L2 holds.
class Deltas {
 public:
  Deltas(DeltaType type, const Shape& shape, std::int32_t group_size, std::mt19937_64& rng)
      : source_(type, shape.rows, shape.columns, group_size, rng, false),
        host_(source_.tile()),
        pitch_((host_.size() + 255) / 256 * 256) {}

  const RandomDelta& source() const { return source_; }
  double num_bytes() const { return static_cast<double>(host_.size()); }
  // How many make about so many bytes.
  int count(double wanted) const {
    return std::max(1, static_cast<int>(std::lround(wanted / num_bytes())));
  }
  // The next of at least `least`.
  DeltaMatrix next(int least) {
    const int wanted = std::max(least, static_cast<int>(std::ceil(kRotatedBytes / num_bytes())));
    while (static_cast<int>(copies_.size()) < wanted) {
      copies_.emplace_back(pitch_);
      copies_.back().upload(host_);
    }
    next_ = (next_ + 1) % copies_.size();
    return {copies_[next_].as<void>(), source_.type, source_.group_size, source_.rows,
            source_.columns};
  }

 private:
  RandomDelta source_;
  std::vector<std::uint8_t> host_;
  std::size_t pitch_, next_ = 0;
  std::vector<DeviceBytes> copies_;
};

std::vector<std::uint16_t> random_bits(std::size_t count, DType dtype) {
  std::mt19937_64 rng(3);
  std::vector<std::uint16_t> bits(count);
  for (auto& v : bits) {
    const float value = static_cast<float>(rng() % 2048) / 1024.0F - 1.0F;
    v = dtype == DType::kFloat16 ? to_half(value).bits : to_bfloat16(value).bits;
  }
  return bits;
}

// Launches of num_deltas deltas of `tokens` rows each.
class Sbmm {
 public:
  Sbmm(Deltas& deltas, int tokens, int num_deltas, DType dtype)
      : num_ctas_(count_sms() * cuda::kCtasPerSm),
        num_deltas_(num_deltas),
        rows_(std::int64_t{tokens} * num_deltas),
        in_(deltas.source().columns),
        out_(deltas.source().rows),
        dtype_(dtype),
        x_(static_cast<std::size_t>(rows_ * in_) * 2),
        fixed_x_(static_cast<std::size_t>(rows_ * cuda::fixed_point_row(in_).num_bytes)),
        y_(static_cast<std::size_t>(rows_ * out_) * 2),
        tasks_(sizeof(cuda::SbmmDeviceTask) * static_cast<std::size_t>(kLaunches * num_deltas)),
        ranges_(sizeof(cuda::SbmmCtaRange) * static_cast<std::size_t>(kLaunches * num_ctas_)) {
    x_.upload(random_bits(static_cast<std::size_t>(rows_ * in_), dtype));
    DZ_CUDA(cudaMemset(y_.as<void>(), 0, static_cast<std::size_t>(rows_ * out_) * 2));
    std::vector<cuda::SbmmDeviceTask> tasks;
    std::vector<cuda::SbmmCtaRange> ranges;
    for (int launch = 0; launch < kLaunches; ++launch) {
      std::vector<SbmmTask> given(static_cast<std::size_t>(num_deltas));
      for (int i = 0; i < num_deltas; ++i) {
        SbmmTask& task = given[static_cast<std::size_t>(i)];
        task.delta = deltas.next(num_deltas);
        task.first_row = i * tokens;
        task.num_rows = tokens;
      }
      cuda::SbmmPlan plan;
      cuda::make_sbmm_plan(plan, given, num_ctas_);
      tasks.insert(tasks.end(), plan.tasks.begin(), plan.tasks.end());
      ranges.insert(ranges.end(), plan.ranges.begin(), plan.ranges.end());
    }
    tasks_.upload(tasks);
    ranges_.upload(ranges);
  }

  void launch_fixed_point(cudaStream_t stream) const {
    cuda::launch_fixed_point({.x = x_.as<void>(),
                              .out = fixed_x_.as<void>(),
                              .num_rows = rows_,
                              .columns = in_,
                              .x_stride = in_,
                              .dtype = dtype_},
                             stream);
  }
  void launch(int i, cudaStream_t stream) const {
    cuda::SbmmLaunch launch{};
    launch.x = fixed_x_.as<void>();
    launch.y = y_.as<void>();
    launch.tasks = tasks_.as<cuda::SbmmDeviceTask>() + i * num_deltas_;
    launch.ranges = ranges_.as<cuda::SbmmCtaRange>() + i * num_ctas_;
    launch.x_row_bytes = cuda::fixed_point_row(in_).num_bytes;
    launch.y_stride = out_;
    launch.num_ctas = num_ctas_;
    launch.y_dtype = dtype_;
    cuda::launch_sbmm(launch, stream);
  }
  // With `converts`, x to fixed point before each launch.
  double time(bool converts = false) const {
    return time_launches([&](int i, cudaStream_t stream) {
      if (converts) launch_fixed_point(stream);
      launch(i, stream);
    });
  }

  std::int64_t num_rows() const { return rows_; }
  void* x() const { return x_.as<void>(); }
  void* y() const { return y_.as<void>(); }

 private:
  int num_ctas_, num_deltas_;
  std::int64_t rows_, in_, out_;
  DType dtype_;
  DeviceBytes x_, fixed_x_, y_, tasks_, ranges_;
};

// Base products of the same rows, over weights that do not fit L2.
class Base {
 public:
  explicit Base(const Shape& shape)
      : shape_(shape),
        num_sms_(count_sms()),
        size_(static_cast<std::size_t>(shape.rows * shape.columns) * 2),
        count_(static_cast<int>(std::ceil(kRotatedBytes / static_cast<double>(size_))) + 1),
        weights_(size_ * static_cast<std::size_t>(count_)),
        partials_(cuda::stream_gemm_partials_bytes(num_sms_)),
        counters_(cuda::stream_gemm_counters_bytes(shape.rows)) {
    DZ_CUDA(cudaMemset(counters_.as<void>(), 0, cuda::stream_gemm_counters_bytes(shape.rows)));
    const auto bits = random_bits(size_ / 2, DType::kFloat16);
    for (int i = 0; i < count_; ++i) {
      DZ_CUDA(cudaMemcpy(weights_.as<unsigned char>() + size_ * static_cast<std::size_t>(i),
                         bits.data(), size_, cudaMemcpyHostToDevice));
    }
  }
  void launch(int i, const Sbmm& sbmm, cudaStream_t stream) const {
    cuda::launch_stream_gemm(
        {.x = sbmm.x(),
         .weight = weights_.as<unsigned char>() + size_ * static_cast<std::size_t>(i % count_),
         .y = sbmm.y(),
         .partials = partials_.as<float>(),
         .counters = counters_.as<std::uint32_t>(),
         .num_tokens = sbmm.num_rows(),
         .in_features = shape_.columns,
         .out_features = shape_.rows,
         .dtype = DType::kFloat16,
         .y_dtype = DType::kFloat16,
         .num_sms = num_sms_},
        stream);
  }
  double num_bytes() const { return static_cast<double>(size_); }

 private:
  Shape shape_;
  int num_sms_;
  std::size_t size_;
  int count_;
  DeviceBytes weights_, partials_, counters_;
};

void print_line(Deltas& deltas, int tokens, int num_deltas, DType dtype, double stream) {
  const RandomDelta& delta = deltas.source();
  const Sbmm sbmm(deltas, tokens, num_deltas, dtype);
  const double us = sbmm.time();
  const double bytes = deltas.num_bytes() * num_deltas;
  printf("%-17s %5ld x %-5ld %4d %3d %4d %7.1f %8.1f %7.0f %5.1f%% %8.1f%s\n",
         name(delta.type).data(), delta.columns, delta.rows, delta.group_size, tokens, num_deltas,
         bytes / 1e6, us, bytes / us / 1e3, bytes / us / 1e4 / stream, sbmm.time(true),
         dtype == DType::kBFloat16 ? " bf16" : "");
}

void time_anchors(double stream, std::mt19937_64& rng) {
  for (const Shape& shape : {Shape{4096, 4096}, Shape{4096, 11008}, Shape{11008, 4096}}) {
    for (int type = 0; type < 3; ++type) {
      Deltas deltas(static_cast<DeltaType>(type), shape, 128, rng);
      for (const int count : {1, 2, 8, 32}) print_line(deltas, 1, count, DType::kFloat16, stream);
      for (const int tokens : {8, 16, 32}) print_line(deltas, tokens, 32, DType::kFloat16, stream);
    }
  }
}

void time_all(double stream, std::mt19937_64& rng) {
  for (const Shape& shape : kShapes) {
    for (int type = 0; type < 3; ++type) {
      for (const std::int32_t group : {128, 64}) {
        Deltas deltas(static_cast<DeltaType>(type), shape, group, rng);
        for (const double wanted : {20e6, 50e6, 125e6}) {
          const int count = deltas.count(wanted);
          print_line(deltas, 1, count, DType::kFloat16, stream);
          print_line(deltas, 8, count, DType::kFloat16, stream);
          if (group == 64 || shape.rows == 12288) continue;
          print_line(deltas, 16, count, DType::kFloat16, stream);
          if (wanted > 60e6) print_line(deltas, 32, count, DType::kFloat16, stream);
          if (wanted > 60e6) print_line(deltas, 8, count, DType::kBFloat16, stream);
        }
      }
    }
  }
}

// By bytes of active deltas: a launch's fixed time shows where they are few.
void time_bytes(double stream, std::mt19937_64& rng) {
  for (int type = 0; type < 3; ++type) {
    for (const Shape& shape : kShapes) {
      Deltas deltas(static_cast<DeltaType>(type), shape, 128, rng);
      printf("%-17s %5ld x %-5ld", name(deltas.source().type).data(), shape.columns, shape.rows);
      for (const int tokens : {1, 8}) {
        printf("  t=%d:", tokens);
        for (const double wanted : {20e6, 50e6, 125e6}) {
          const int count = deltas.count(wanted);
          const double us = Sbmm(deltas, tokens, count, DType::kFloat16).time();
          const double bytes = deltas.num_bytes() * count;
          printf(" %4.0f MB %5.1f us %4.1f%%", bytes / 1e6, us, bytes / us / 1e4 / stream);
        }
      }
      printf("\n");
    }
  }
}

// What SBMM and the conversion of x add to a base product, of rows that each have another delta.
void time_chains(double stream, std::mt19937_64& rng) {
  printf("us of a pair, of each alone in a chain of its own, share of the stream of a pair\n");
  for (const Shape& shape : kShapes) {
    const Base base(shape);
    for (int type = 0; type < 3; ++type) {
      Deltas deltas(static_cast<DeltaType>(type), shape, 128, rng);
      for (const int rows : {1, 8, 32}) {
        const Sbmm sbmm(deltas, 1, rows, DType::kFloat16);
        const double pair = time_launches([&](int i, cudaStream_t queue) {
          sbmm.launch_fixed_point(queue);
          base.launch(i, sbmm, queue);
          sbmm.launch(i, queue);
        });
        const double alone =
            time_launches([&](int i, cudaStream_t queue) { base.launch(i, sbmm, queue); });
        const double bytes = base.num_bytes() + deltas.num_bytes() * rows;
        printf("%-17s %5ld x %-5ld D %2d  pair %6.1f  base %6.1f  sbmm %6.1f  %4.1f%%\n",
               name(deltas.source().type).data(), shape.columns, shape.rows, rows, pair, alone,
               sbmm.time(), bytes / pair / 1e4 / stream);
      }
    }
  }
}

}  // namespace

void time_sbmm(TimedCases cases) {
  const double stream = read_bandwidth();
  std::mt19937_64 rng(1);
  if (cases == TimedCases::kBytes) return time_bytes(stream, rng);
  if (cases == TimedCases::kChains) return time_chains(stream, rng);
  printf("%-17s %5s x %-5s %4s %3s %4s %7s %8s %7s %6s %8s\n", "type", "K", "N", "g", "t", "D",
         "MB", "us", "GB/s", "share", "with x");
  if (cases == TimedCases::kAnchors) return time_anchors(stream, rng);
  time_all(stream, rng);
}

}  // namespace deltazip::bench
