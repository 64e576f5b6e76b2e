#include "bench.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "deltazip/base/error.h"

namespace deltazip::bench {
namespace {

// As many layers as a model may have; more turns than that are split over several steps.
constexpr std::int64_t kMaxTurnsPerStep = 64;
// A backend runs a step, records it, then replays it: the first replay may still be slow.
constexpr int kWarmUps = 4;
constexpr double kBatchMs = 2.0;  // long beside the resolution of an event

DType one_dtype(const Options& options) {
  const auto dtype = dtype_from_name(options.dtype);
  DZ_CHECK(dtype.has_value() && is_floating(*dtype), "--dtype: unknown dtype '", options.dtype,
           "', expected bfloat16, float16 or float32");
  return *dtype;
}

BackendOptions backend_options(const Options& options) {
  return {
      .num_threads = options.num_threads, .isa = options.isa, .compute_dtype = one_dtype(options)};
}

}  // namespace

Bench::Bench(const Options& options)
    : options_(options),
      backend_(make_backend(options.device, backend_options(options))),
      stream_(backend_->create_stream()),
      activations_(backend_->activation_dtype(one_dtype(options))) {
  copy_gb_per_s_ = measure_copy();
}

double Bench::measure_copy() {
  const std::size_t num_bytes = static_cast<std::size_t>(options_.rotate_mib) << 20;
  const Buffer from = backend_->allocate(num_bytes), to = backend_->allocate(num_bytes);
  const auto before = backend_->create_event(), after = backend_->create_event();
  double best_ms = 0.0;
  for (int i = 0; i < 8; ++i) {
    before->record(*stream_);
    backend_->copy_on_device(to.data(), from.data(), num_bytes, *stream_);
    after->record(*stream_);
    stream_->synchronize();
    const double ms = after->ms_since(*before);
    if (i == 1 || (i > 1 && ms < best_ms)) best_ms = ms;  // the first touches the pages
  }
  return 2e-6 * static_cast<double>(num_bytes) / std::max(best_ms, 1e-6);
}

Buffer Bench::upload(const void* host, std::size_t num_bytes) {
  Buffer buffer = backend_->allocate(num_bytes);
  backend_->copy_to_device(buffer.data(), host, num_bytes, *stream_);
  stream_->synchronize();
  return buffer;
}

Buffer Bench::random(std::int64_t count, DType dtype) {
  std::normal_distribution<float> normal;
  std::vector<std::byte> host(static_cast<std::size_t>(count) * size_of(dtype));
  auto* words = reinterpret_cast<std::uint16_t*>(host.data());
  auto* floats = reinterpret_cast<float*>(host.data());
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = normal(rng_);
    if (dtype == DType::kFloat32) {
      floats[i] = value;
    } else {
      words[i] = dtype == DType::kFloat16 ? to_half(value).bits : to_bfloat16(value).bits;
    }
  }
  return upload(host.data(), host.size());
}

std::int64_t Bench::num_copies(std::size_t num_bytes) const {
  return 1 + (options_.rotate_mib << 20) / static_cast<std::int64_t>(num_bytes);
}

void Bench::measure(const Label& label, std::int64_t num_turns,
                    const std::function<void(std::int64_t)>& body, bool replays) {
  ++num_measured_;
  const std::int64_t per_step = std::min(num_turns, kMaxTurnsPerStep);
  const std::int64_t num_steps = (num_turns + per_step - 1) / per_step;
  const auto step = [&](std::int64_t s) {
    const std::int64_t first = s * per_step, last = std::min(num_turns, first + per_step);
    for (std::int64_t turn = first; turn < last; ++turn) body(turn);
  };
  const auto before = backend_->create_event(), after = backend_->create_event();
  const auto milliseconds = [&](std::int64_t rounds) {
    before->record(*stream_);
    for (std::int64_t round = 0; round < rounds; ++round) {
      for (std::int64_t s = 0; s < num_steps; ++s) {
        if (replays) {
          const StepKey key{-1, num_measured_, static_cast<std::int32_t>(s), 0};
          backend_->run_step(key, *stream_, [&] { step(s); });
        } else {
          step(s);
        }
      }
    }
    after->record(*stream_);
    stream_->synchronize();
    return after->ms_since(*before);
  };
  double once = 0.0;
  for (int i = 0; i < (replays ? kWarmUps : 1); ++i) once = std::max(milliseconds(1), 1e-4);
  const auto rounds = std::max<std::int64_t>(1, static_cast<std::int64_t>(kBatchMs / once));
  std::vector<double> times;
  for (double total = 0.0; total < static_cast<double>(options_.min_ms) || times.size() < 3;) {
    const double ms = milliseconds(rounds);
    total += ms;
    times.push_back(1e3 * ms / static_cast<double>(rounds * num_turns));
  }
  std::sort(times.begin(), times.end());
  print(label, times[times.size() / 2], times.front());
}

void Bench::print_header() {
  if (options_.json) return;
  std::printf("%s; a copy on it moves %.1f GB/s, read and written\n",
              backend_->description().c_str(), copy_gb_per_s_);
  std::printf("%-13s %-17s %-12s %5s %6s %10s %10s %9s %6s %10s\n", "op", "format", "KxN", "D",
              "tokens", "us", "best us", "GB/s", "share", "GFLOP/s");
}

void Bench::print(const Label& label, double us, double best_us) {
  const double gbs = label.bytes / us * 1e-3, gflops = label.flops / us * 1e-3;
  const double share = gbs / copy_gb_per_s_;
  if (options_.json) {
    std::printf(
        "{\"op\":\"%s\",\"format\":\"%s\",\"columns\":%lld,\"rows\":%lld,\"deltas\":%lld,"
        "\"tokens\":%lld,\"us\":%.3f,\"best_us\":%.3f,\"gb_per_s\":%.3f,\"share_of_copy\":%.4f,"
        "\"gflop_per_s\":%.3f,\"copy_gb_per_s\":%.1f,\"dtype\":\"%s\",\"device\":\"%s\"}\n",
        label.op.c_str(), label.format.c_str(), static_cast<long long>(label.columns),
        static_cast<long long>(label.rows), static_cast<long long>(label.deltas),
        static_cast<long long>(label.tokens), us, best_us, gbs, share, gflops, copy_gb_per_s_,
        std::string(name(activations_)).c_str(), backend_->description().c_str());
  } else {
    const auto size = std::to_string(label.columns) + "x" + std::to_string(label.rows);
    std::printf("%-13s %-17s %-12s %5lld %6lld %10.2f %10.2f %9.1f %5.0f%% %10.1f\n",
                label.op.c_str(), label.format.c_str(), size.c_str(),
                static_cast<long long>(label.deltas), static_cast<long long>(label.tokens), us,
                best_us, gbs, 100.0 * share, gflops);
  }
  std::fflush(stdout);
}

}  // namespace deltazip::bench
