#pragma once

// What the ops' tests share: every backend present, random operands in poisoned memory, and
// double-precision references written from docs/delta_format.md and the papers, not from the code.

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backend/cuda_problem.h"
#include "backend/device_memory.h"
#include "backend/host_ops.h"
#include "deltazip/backend/backend.h"
#include "deltazip/base/error.h"

namespace deltazip::testing {

using Rng = std::mt19937_64;

class Matrix;

// "cpu/scalar", "cpu/avx2", "cpu/apart", "cuda/float16", ...: all that this machine runs.
std::vector<std::string> backend_names();
std::unique_ptr<Backend> open_backend(const std::string& name, int num_threads = 2);

// A backend beside the test's own, to compare with.
struct OpenedBackend {
  OpenedBackend(const std::string& name, int num_threads)
      : backend(open_backend(name, num_threads)), stream(backend->create_stream()), ops(*backend) {}
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Stream> stream;
  HostOps ops;
};

// A test that runs once on every backend. Operands are rounded to what the backend computes in, so
// that nothing is lost on the way there and a double-precision reference holds for all.
class BackendTest : public ::testing::TestWithParam<std::string> {
 protected:
  BackendTest();
  HostOps& ops() { return ops_; }
  Stream& stream() { return *stream_; }
  Backend& backend() { return *backend_; }
  bool is_device() const { return !GetParam().starts_with("cpu"); }
  DType dtype() const { return backend_->activation_dtype(DType::kFloat32); }
  float rounded(float value) const { return round_to(value, dtype()); }
  Matrix random(std::int64_t rows, std::int64_t columns, float scale = 1.0F);

  // The error that rounding to the backend's dtype may add; `on_cpu` where it computes in float32.
  double tolerance(double on_cpu, Out out = Out::kActivation) const;
  // The CPU promises that a row's bits depend on nothing but the row; devices that its value does.
  bool same_row(const float* actual, const float* expected, std::int64_t count) const;
  std::vector<int> thread_counts() const;
  std::vector<DType> cache_dtypes() const;
  std::vector<Out> outs() const;
  Rng rng_{20250123};

 private:
  std::shared_ptr<Backend> backend_;
  std::unique_ptr<Stream> stream_;
  HostOps ops_;
};

#define DZ_ON_EVERY_BACKEND(suite)                                                     \
  INSTANTIATE_TEST_SUITE_P(All, suite, ::testing::ValuesIn(backend_names()),           \
                           [](const auto& entry) {                                     \
                             std::string label = entry.param;                          \
                             for (char& c : label) c = c == '/' || c == ':' ? '_' : c; \
                             return label;                                             \
                           })

// A float matrix with NaN before and after it, so that a stray read or write is seen.
class Matrix {
 public:
  Matrix(std::int64_t rows, std::int64_t columns,
         float fill = std::numeric_limits<float>::quiet_NaN());
  static Matrix random(std::int64_t rows, std::int64_t columns, Rng& rng, float scale = 1.0F);

  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }
  float* data() { return values_.data() + kGuard; }
  const float* data() const { return values_.data() + kGuard; }
  float* row(std::int64_t r) { return data() + r * columns_; }
  const float* row(std::int64_t r) const { return data() + r * columns_; }
  TensorView view() { return {data(), DType::kFloat32, {rows_, columns_}}; }
  ConstTensorView view() const { return {data(), DType::kFloat32, {rows_, columns_}}; }
  bool guards_intact() const;
  // Rows [first, first + count) as a matrix of their own.
  Matrix slice(std::int64_t first, std::int64_t count) const;
  Matrix select(std::span<const std::int64_t> columns) const;
  bool is_finite() const;

 private:
  static constexpr std::size_t kGuard = 64;
  std::int64_t rows_, columns_;
  std::vector<float> values_;
};

using Reference = std::vector<double>;

// Some columns of a product too large to be computed in full on the host.
std::vector<std::int64_t> sampled_columns(std::int64_t num_columns, Rng& rng);

// |a - b|_2 / |b|_2: does not depend on scale.
double relative_error(const Matrix& actual, const Reference& expected);
// max |a - b| / max |b|.
double max_error(const Matrix& actual, const Reference& expected);
// Equal to the last bit.
bool same_bits(const float* a, const float* b, std::int64_t count);

// A base weight as a checkpoint holds it, and packed.
struct Weight {
  Weight(Backend& backend, Stream& stream, std::int64_t rows, std::int64_t columns, DType dtype,
         Rng& rng);
  double at(std::int64_t row, std::int64_t column) const {
    return dense[static_cast<std::size_t>(row * packed.columns + column)];
  }
  std::vector<double> dense;  // [rows, columns], as the backend holds them
  Buffer buffer;
  PackedMatrix packed;
};

inline constexpr DeltaType kDeltaTypes[] = {DeltaType::kSparse24Int4,    DeltaType::kSparse24Int2,
                                            DeltaType::kSparse24Ternary, DeltaType::kDenseInt4,
                                            DeltaType::kDenseInt8,       DeltaType::kSparse14Sign};

// A random delta in the file's layout, its dense value, and tiled.
struct Delta {
  Delta(Backend& backend, DeltaType type, std::int64_t rows, std::int64_t columns,
        std::int32_t group_size, Rng& rng);
  double at(std::int64_t row, std::int64_t column) const {
    return dense[static_cast<std::size_t>(row * matrix.columns + column)];
  }
  DeltaSource source() const;
  std::vector<std::byte> values, indices, scales;
  std::vector<double> dense;  // [rows, columns]
  DeltaType source_type;      // the file's; the backend's may be another
  Buffer tiled;
  DeltaMatrix matrix;
};

}  // namespace deltazip::testing
