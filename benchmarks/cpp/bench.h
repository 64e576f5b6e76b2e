#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "deltazip/backend/backend.h"
#include "options.h"

namespace deltazip::bench {

// What is said of a measurement besides its time.
struct Label {
  std::string op, format;
  std::int64_t columns = 0, rows = 0;  // K x N of a matrix; other ops say what theirs are
  std::int64_t deltas = 0, tokens = 0;
  double bytes = 0.0, flops = 0.0;  // that one call has to move and to do
};

// One backend under measurement: random operands on the device, times by its own events.
class Bench {
 public:
  explicit Bench(const Options& options);

  const Options& options() const { return options_; }
  Backend& backend() { return *backend_; }
  Stream& stream() { return *stream_; }
  std::mt19937_64& rng() { return rng_; }
  DType activations() const { return activations_; }  // of x and y of every op

  Buffer upload(const void* host, std::size_t num_bytes);
  Buffer random(std::int64_t count, DType dtype);  // normal
  // [rows, columns] of random activations; the buffer must outlive the view.
  TensorView view(const Buffer& buffer, std::int64_t rows, std::int64_t columns) const {
    return {buffer.data(), activations_, {rows, columns}};
  }
  // How many operands of this size are rotated so that no cache holds them all.
  std::int64_t num_copies(std::size_t num_bytes) const;

  // Times calls body(0) ... body(num_turns - 1), again and again, and prints the median of a call.
  // They are given to the backend as steps, as a model gives its layers: a device may replay them.
  // Operands of a turn must stay where they are. `replays`: false for an op that a step may not
  // hold.
  void measure(const Label& label, std::int64_t num_turns,
               const std::function<void(std::int64_t)>& body, bool replays = true);

  void print_header();

 private:
  void print(const Label& label, double us, double best_us);
  double measure_copy();

  const Options options_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Stream> stream_;
  DType activations_;
  std::mt19937_64 rng_{1};
  std::int32_t num_measured_ = 0;  // in the keys of steps: each measurement has its own
  double copy_gb_per_s_ = 0.0;     // bytes read and written by a large copy on the device
};

// One function per subject; each reads the options and measures.
void bench_linear(Bench& bench);
void bench_linear_each(Bench& bench);
void bench_sbmm(Bench& bench);
void bench_project(Bench& bench);
void bench_attention(Bench& bench);
void bench_rope_append(Bench& bench);
void bench_rms_norm(Bench& bench);
void bench_silu_mul(Bench& bench);
void bench_sample(Bench& bench);

}  // namespace deltazip::bench
