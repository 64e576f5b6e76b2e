#include "backend/harness.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>

#include "backend/cpu/isa.h"
#include "backend/wrapped_backend.h"

namespace deltazip::testing {
namespace {

std::size_t to_size(std::int64_t value) { return static_cast<std::size_t>(value); }

std::int64_t divide_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

// The CPU as if its memory were not the host's: proves the tests' own way to a device.
class ApartBackend : public test::WrappedBackend {
 public:
  using WrappedBackend::WrappedBackend;
  bool shares_host_memory() const override { return false; }
};

// Opening a device takes long, so the tests of one share it; closed before the process ends.
std::map<std::string, std::shared_ptr<Backend>>& open_devices() {
  static std::map<std::string, std::shared_ptr<Backend>> devices;
  return devices;
}

class CloseDevices : public ::testing::Environment {
  void TearDown() override { open_devices().clear(); }
};

std::shared_ptr<Backend> shared_backend(const std::string& name) {
  if (name.starts_with("cpu")) return open_backend(name);
  if (open_devices().empty()) ::testing::AddGlobalTestEnvironment(new CloseDevices);
  std::shared_ptr<Backend>& backend = open_devices()[name];
  if (backend == nullptr) backend = open_backend(name);
  return backend;
}

}  // namespace

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const std::string& isa : cpu::available_isas()) names.push_back("cpu/" + isa);
  names.push_back("cpu/apart");
  if (cuda_problem().empty()) names.insert(names.end(), {"cuda/float16", "cuda/bfloat16"});
  return names;
}

std::unique_ptr<Backend> open_backend(const std::string& name, int num_threads) {
  const std::size_t slash = name.find('/');
  if (name == "cpu/apart") {
    return std::make_unique<ApartBackend>(
        make_backend("cpu", {.num_threads = num_threads, .isa = ""}));
  }
  BackendOptions options{.num_threads = num_threads, .isa = ""};
  const std::string device = name.substr(0, slash);
  if (slash != std::string::npos && device == "cpu") options.isa = name.substr(slash + 1);
  if (slash != std::string::npos && device != "cpu") {
    options.compute_dtype = dtype_from_name(name.substr(slash + 1)).value();
  }
  return make_backend(device, options);
}

BackendTest::BackendTest()
    : backend_(shared_backend(GetParam())), stream_(backend_->create_stream()), ops_(*backend_) {}

Matrix BackendTest::random(std::int64_t rows, std::int64_t columns, float scale) {
  Matrix matrix = Matrix::random(rows, columns, rng_, scale);
  for (std::int64_t i = 0; i < rows * columns; ++i) matrix.data()[i] = rounded(matrix.data()[i]);
  return matrix;
}

// Four and two units in the last place of what is rounded; sums are float32 everywhere.
double BackendTest::tolerance(double on_cpu, Out out) const {
  if (dtype() == DType::kFloat32) return on_cpu;
  if (out == Out::kFloat32) return std::max(on_cpu, 1e-4);
  return std::max(on_cpu, dtype() == DType::kFloat16 ? 1e-3 : 8e-3);
}

bool BackendTest::same_row(const float* actual, const float* expected, std::int64_t count) const {
  if (dtype() == DType::kFloat32) return same_bits(actual, expected, count);
  double largest = 0.0, scale = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double error =
        std::abs(static_cast<double>(actual[i]) - static_cast<double>(expected[i]));
    if (std::isnan(error)) return false;
    largest = std::max(largest, error);
    scale = std::max(scale, std::abs(static_cast<double>(expected[i])));
  }
  return largest <= tolerance(0.0) * scale;
}

std::vector<int> BackendTest::thread_counts() const {
  return is_device() ? std::vector{1} : std::vector{1, 2, 3};
}

std::vector<DType> BackendTest::cache_dtypes() const {
  if (is_device()) return {dtype()};
  return {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
}

std::vector<Out> BackendTest::outs() const {
  return is_device() ? std::vector{Out::kActivation, Out::kFloat32} : std::vector{Out::kActivation};
}

Matrix::Matrix(std::int64_t rows, std::int64_t columns, float fill)
    : rows_(rows),
      columns_(columns),
      values_(to_size(rows * columns) + 2 * kGuard, std::numeric_limits<float>::quiet_NaN()) {
  std::fill_n(data(), rows * columns, fill);
}

Matrix Matrix::random(std::int64_t rows, std::int64_t columns, Rng& rng, float scale) {
  Matrix matrix(rows, columns);
  std::normal_distribution<float> normal(0.0F, scale);
  for (std::int64_t i = 0; i < rows * columns; ++i) matrix.data()[i] = normal(rng);
  return matrix;
}

bool Matrix::guards_intact() const {
  const auto is_nan = [](float v) { return std::isnan(v); };
  return std::all_of(values_.begin(), values_.begin() + kGuard, is_nan) &&
         std::all_of(values_.end() - kGuard, values_.end(), is_nan);
}

Matrix Matrix::slice(std::int64_t first, std::int64_t count) const {
  Matrix part(count, columns_);
  std::copy_n(row(first), count * columns_, part.data());
  return part;
}

std::vector<std::int64_t> sampled_columns(std::int64_t num_columns, Rng& rng) {
  std::set<std::int64_t> columns{0, num_columns / 2, num_columns - 1};
  for (int i = 0; i < 40; ++i) {
    columns.insert(static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(num_columns)));
  }
  return {columns.begin(), columns.end()};
}

Matrix Matrix::select(std::span<const std::int64_t> columns) const {
  Matrix part(rows_, static_cast<std::int64_t>(columns.size()));
  for (std::int64_t r = 0; r < rows_; ++r) {
    for (std::size_t i = 0; i < columns.size(); ++i) part.row(r)[i] = row(r)[columns[i]];
  }
  return part;
}

bool Matrix::is_finite() const {
  return std::all_of(data(), data() + rows_ * columns_, [](float v) { return std::isfinite(v); });
}

double relative_error(const Matrix& actual, const Reference& expected) {
  double difference = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = static_cast<double>(actual.data()[i]) - expected[i];
    difference += error * error;
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

double max_error(const Matrix& actual, const Reference& expected) {
  double largest = 0.0, scale = 1e-300;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(static_cast<double>(actual.data()[i]) - expected[i]);
    largest = std::isnan(error) ? error : std::max(largest, error);
    if (std::isnan(largest)) return largest;
    scale = std::max(scale, std::abs(expected[i]));
  }
  return largest / scale;
}

bool same_bits(const float* a, const float* b, std::int64_t count) {
  return std::memcmp(a, b, sizeof(float) * to_size(count)) == 0;
}

Weight::Weight(Backend& backend, Stream& stream, std::int64_t rows, std::int64_t columns,
               DType dtype, Rng& rng)
    : buffer(backend.allocate(backend.packed_bytes(dtype, rows, columns))),
      packed{buffer.data(), backend.packed_dtype(dtype), rows, columns} {
  std::normal_distribution<float> normal(0.0F, 0.05F);
  std::vector<float> floats(to_size(rows * columns));
  for (float& value : floats) value = round_to(normal(rng), dtype);
  for (const float value : floats) {
    dense.push_back(static_cast<double>(round_to(value, packed.dtype)));
  }
  const std::vector<std::byte> poison(buffer.num_bytes(), std::byte{0xFF});
  backend.copy_to_device(buffer.data(), poison.data(), poison.size(), stream);
  const std::vector<std::byte> host = to_bytes(floats, dtype);
  backend.pack_weight(buffer.data(), {host.data(), dtype, {rows, columns}}, stream);
  stream.synchronize();
}

Delta::Delta(Backend& backend, DeltaType type, std::int64_t rows, std::int64_t columns,
             std::int32_t group_size, Rng& rng)
    : dense(to_size(rows * columns)),
      source_type(type),
      matrix{nullptr, backend.tiled_type(type), group_size, rows, columns} {
  const std::int64_t padded = divide_up(columns, 32) * 32;
  const std::int64_t groups = divide_up(columns, group_size);
  const auto random_below = [&](unsigned bound) { return static_cast<unsigned>(rng() % bound); };
  const auto put_bits = [](std::vector<std::byte>& bytes, std::int64_t bit, unsigned count,
                           unsigned value) {
    for (unsigned i = 0; i < count; ++i, ++bit) {
      bytes[to_size(bit / 8)] |= static_cast<std::byte>(((value >> i) & 1u) << (bit % 8));
    }
  };
  const std::array<std::int64_t, 6> value_bits{rows * padded * 2,     rows * padded,
                                               rows * padded * 5 / 4, rows * padded * 4,
                                               rows * padded * 8,     rows * padded * 3 / 4};
  values.resize(to_size(value_bits[static_cast<std::size_t>(type)] / 8));
  const bool has_indices = type == DeltaType::kSparse24Int4 || type == DeltaType::kSparse24Int2;
  if (has_indices) indices.resize(to_size(rows * padded / 8));

  std::vector<double> codes(to_size(rows * padded));
  for (std::int64_t row = 0; row < rows; ++row) {
    double* value = codes.data() + row * padded;
    for (std::int64_t j = 0; j < padded / 4; ++j, value += 4) {
      const std::int64_t group = row * (padded / 4) + j;
      if (type == DeltaType::kDenseInt4) {
        for (int i = 0; i < 4; ++i) {
          const unsigned code = random_below(16);
          put_bits(values, 4 * (4 * group + i), 4, code);
          value[i] = static_cast<double>(code) - 8.0;
        }
      } else if (type == DeltaType::kDenseInt8) {
        for (int i = 0; i < 4; ++i) {
          const unsigned code = random_below(256);
          put_bits(values, 8 * (4 * group + i), 8, code);
          value[i] = static_cast<double>(code) - 128.0;
        }
      } else if (type == DeltaType::kSparse14Sign) {
        const unsigned code = random_below(8);
        put_bits(values, 3 * group, 3, code);
        value[code / 2] = code % 2 == 0 ? 1.0 : -1.0;
      } else if (type == DeltaType::kSparse24Ternary) {
        constexpr int kPairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
        const unsigned code = random_below(32), d = code - 8;
        put_bits(values, 5 * group, 5, code);
        if (code < 8) {
          value[code / 2] = code % 2 == 0 ? 1.0 : -1.0;
        } else {
          value[kPairs[d / 4][0]] = (d & 1u) != 0 ? -1.0 : 1.0;
          value[kPairs[d / 4][1]] = (d & 2u) != 0 ? -1.0 : 1.0;
        }
      } else {
        const unsigned index0 = random_below(3);
        const unsigned index1 = index0 + 1 + random_below(3 - index0);
        put_bits(indices, 4 * group, 4, index0 | index1 << 2);
        const bool is_int4 = type == DeltaType::kSparse24Int4;
        for (const unsigned kept : {0u, 1u}) {
          const unsigned code = random_below(is_int4 ? 16 : 4);
          if (is_int4) {
            put_bits(values, 8 * group + 4 * kept, 4, code);
          } else {
            put_bits(values, 4 * group + 2 * kept, 2, code);
          }
          value[kept == 0 ? index0 : index1] =
              is_int4 ? static_cast<double>(code) - 8.0 : 2.0 * static_cast<double>(code) - 3.0;
        }
      }
    }
  }
  std::uniform_real_distribution<float> scale_distribution(0.001F, 0.02F);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t group = 0; group < groups; ++group) {
      const Half scale = to_half(scale_distribution(rng));
      scales.push_back(static_cast<std::byte>(scale.bits & 0xFF));
      scales.push_back(static_cast<std::byte>(scale.bits >> 8));
      for (std::int64_t k = group * group_size; k < std::min((group + 1) * group_size, columns);
           ++k) {
        dense[to_size(row * columns + k)] =
            static_cast<double>(to_float(scale)) * codes[to_size(row * padded + k)];
      }
    }
  }
  const std::size_t num_bytes = backend.tiled_bytes(type, rows, columns, group_size);
  const Buffer host = backend.allocate_host(num_bytes);
  std::memset(host.data(), 0xFF, num_bytes);
  backend.tile_delta(host.data(), source());
  tiled = backend.allocate(num_bytes);
  const auto stream = backend.create_stream();
  backend.copy_to_device(tiled.data(), host.data(), num_bytes, *stream);
  stream->synchronize();
  matrix.data = tiled.data();
}

DeltaSource Delta::source() const {
  return {source_type, matrix.rows, matrix.columns, matrix.group_size, values, indices, scales};
}

}  // namespace deltazip::testing
