// SBMM, materialisation included, against double precision on the device at hand.

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <string>

#include "cuda/sbmm_cases.h"

namespace deltazip::bench {
namespace {

using cuda::SbmmPlan;

// A task of a case: which delta, which rows, where it goes.
struct Piece {
  const RandomDelta* delta;  // nullptr: none
  int first_row, num_rows;
  std::int64_t out_offset;
};

struct Case {
  std::vector<Piece> pieces;
  std::int64_t num_rows, in_features, out_features;
  DType dtype = DType::kFloat16, y_dtype = DType::kFloat32;
};

class Checker {
 public:
  Checker() {
    int device = 0;
    DZ_CUDA(cudaGetDevice(&device));
    DZ_CUDA(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device));
  }

  const DeviceBytes& tiled(const RandomDelta& delta) {
    for (auto& [key, bytes] : tiled_) {
      if (key == &delta) return bytes;
    }
    const std::vector<std::uint8_t> host = delta.tile();
    tiled_.emplace_back(&delta, DeviceBytes(host.size()));
    tiled_.back().second.upload(host);
    dense_.emplace_back(delta.dense.size() * 4);
    dense_.back().upload(delta.dense);
    return tiled_.back().second;
  }
  const float* dense(const RandomDelta& delta) {
    tiled(delta);
    for (std::size_t i = 0; i < tiled_.size(); ++i) {
      if (tiled_[i].first == &delta) return dense_[i].as<float>();
    }
    return nullptr;
  }
  void forget() {
    tiled_.clear();
    dense_.clear();
    references_.clear();
  }

  // y after the launch as floats. Prints and counts what is wrong.
  std::vector<float> run(const char* what, const Case& c, const std::vector<float>& x,
                         int num_ctas = 0) {
    const std::size_t in_size = static_cast<std::size_t>(c.num_rows * c.in_features);
    const std::size_t out_size = static_cast<std::size_t>(c.num_rows * c.out_features);
    // Around y lies -0, which not even adding zero leaves as it is.
    constexpr std::size_t kGuard = 128;
    std::vector<std::uint16_t> x_bits(in_size);
    std::vector<float> x_rounded(in_size), y0(out_size);
    for (std::size_t i = 0; i < in_size; ++i) {
      x_bits[i] = to_bits(x[i], c.dtype);
      x_rounded[i] = from_bits(x_bits[i], c.dtype);
    }
    DeviceBytes x_device(in_size * 2 + 256);
    x_device.upload(x_bits);  // what follows is NaN
    std::size_t far_off = 0;
    const DeviceBytes fixed_x = fixed_point(x_device, c.in_features, c.dtype, x_rounded, far_off);
    if (far_off > 0) report("%s: %zu values of x in fixed point are wrong", what, far_off);
    std::mt19937 noise(5);
    const bool is_float = c.y_dtype == DType::kFloat32;
    std::vector<float> y_float(out_size + 2 * kGuard, -0.0F);
    std::vector<std::uint16_t> y_bits(out_size + 2 * kGuard, 0x8000);
    for (std::size_t i = 0; i < out_size; ++i) {
      const float value = static_cast<float>(noise() % 2048) / 1024.0F - 1.0F;
      y_bits[kGuard + i] = to_bits(value, c.dtype);
      y0[i] = is_float ? value : from_bits(y_bits[kGuard + i], c.dtype);
      y_float[kGuard + i] = y0[i];
    }
    DeviceBytes y_device(y_float.size() * 4);

    std::vector<SbmmTask> tasks;
    for (const Piece& piece : c.pieces) {
      SbmmTask task;
      if (piece.delta != nullptr) {
        const RandomDelta& d = *piece.delta;
        task.delta = {tiled(d).as<void>(), d.type, d.group_size, d.rows, d.columns};
      }
      task.first_row = piece.first_row;
      task.num_rows = piece.num_rows;
      task.out_offset = piece.out_offset;
      tasks.push_back(task);
    }
    SbmmPlan plan;
    const int ctas = num_ctas > 0 ? num_ctas : num_sms_ * cuda::kCtasPerSm;
    cuda::make_sbmm_plan(plan, tasks, ctas);
    DeviceBytes task_bytes(plan.tasks.size() * sizeof(plan.tasks[0])),
        range_bytes(plan.ranges.size() * sizeof(plan.ranges[0]));
    task_bytes.upload(plan.tasks);
    range_bytes.upload(plan.ranges);
    cuda::SbmmLaunch launch{};
    launch.x = fixed_x.as<void>();
    launch.y = y_device.as<unsigned char>() + kGuard * (is_float ? 4 : 2);
    launch.tasks = task_bytes.as<cuda::SbmmDeviceTask>();
    launch.ranges = range_bytes.as<cuda::SbmmCtaRange>();
    launch.x_row_bytes = cuda::fixed_point_row(c.in_features).num_bytes;
    launch.y_stride = c.out_features;
    launch.num_ctas = ctas;
    launch.y_dtype = c.y_dtype;

    std::vector<float> first, y;
    bool is_repeatable = true;
    std::size_t guards_broken = 0;
    for (int repeat = 0; repeat < 2; ++repeat) {
      if (is_float) {
        y_device.upload(y_float);
      } else {
        y_device.upload(y_bits);
      }
      cuda::launch_sbmm(launch, nullptr);
      const cudaError_t error = cudaDeviceSynchronize();
      if (error != cudaSuccess) {
        printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
        exit(1);
      }
      std::vector<float> all(y_float.size());
      if (is_float) {
        all = y_device.download<float>(all.size());
      } else {
        const auto bits = y_device.download<std::uint16_t>(all.size());
        for (std::size_t i = 0; i < all.size(); ++i) all[i] = from_bits(bits[i], c.dtype);
      }
      for (std::size_t i = 0; i < kGuard; ++i) {
        for (const float guard : {all[i], all[kGuard + out_size + i]}) {
          guards_broken += guard != 0 || !std::signbit(guard);
        }
      }
      y.assign(all.begin() + kGuard, all.begin() + static_cast<std::ptrdiff_t>(kGuard + out_size));
      if (repeat == 0) first = y;
      is_repeatable &= std::memcmp(first.data(), y.data(), out_size * 4) == 0;
    }
    if (guards_broken > 0) report("%s: %zu values around y were written", what, guards_broken);
    if (!is_repeatable) report("%s: launches of the same input differ", what);
    compare(what, c, x_rounded, y0, y);
    return y;
  }

  template <typename... Args>
  void report(const char* format, Args... args) {
    ++failures_;
    if (failures_ > 40) return;
    printf("FAIL ");
    printf(format, args...);
    printf("\n");
  }
  int failures() const { return failures_; }
  int cases() const { return cases_; }
  double worst() const { return worst_; }

 private:
  void compare(const char* what, const Case& c, const std::vector<float>& x,
               const std::vector<float>& y0, const std::vector<float>& y) {
    ++cases_;
    std::vector<double> expected(y0.begin(), y0.end());
    for (const Piece& piece : c.pieces) {
      if (piece.delta == nullptr || piece.num_rows == 0) continue;
      const RandomDelta& d = *piece.delta;
      const std::vector<double>& add = reference(piece, c, x);
      for (std::int64_t m = 0; m < piece.num_rows; ++m) {
        for (std::int64_t n = 0; n < d.rows; ++n) {
          const auto at = static_cast<std::size_t>((piece.first_row + m) * c.out_features +
                                                   piece.out_offset + n);
          expected[at] += add[static_cast<std::size_t>(m * d.rows + n)];
        }
      }
    }
    double difference = 0, norm = 0, largest = 0, scale = 0;
    std::size_t bad = expected.size(), num_bad = 0;
    const double unit = c.y_dtype == DType::kFloat32   ? 4e-6
                        : c.y_dtype == DType::kFloat16 ? 6e-4
                                                       : 5e-3;
    for (const double v : expected) scale = std::max(scale, std::abs(v));
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double error = std::abs(y[i] - expected[i]);
      difference += error * error;
      norm += expected[i] * expected[i];
      largest = std::max(largest, error);
      if (!(error <= unit * (scale + std::abs(expected[i])))) {
        ++num_bad;
        if (bad == expected.size()) bad = i;
      }
    }
    const double relative = std::sqrt(difference / std::max(norm, 1e-300));
    worst_ = std::max(worst_, relative / unit);
    if (num_bad == 0 && relative < unit) return;
    const auto features = static_cast<std::size_t>(c.out_features);
    if (bad == expected.size()) bad = 0;
    report(
        "%s: relative error %.2e, max %.2e of %.2e; %zu of %zu wrong, first y[%zu, %zu] = %g, "
        "not %g (was %g)",
        what, relative, largest, scale, num_bad, expected.size(), bad / features, bad % features,
        static_cast<double>(y[bad]), expected[bad], static_cast<double>(y0[bad]));
  }

  // The product of a piece's rows; those of a smaller batch are the first of a larger one's.
  const std::vector<double>& reference(const Piece& piece, const Case& c,
                                       const std::vector<float>& x) {
    const RandomDelta& d = *piece.delta;
    const auto wanted = static_cast<std::size_t>(piece.num_rows * d.rows);
    for (const Reference& known : references_) {
      if (known.delta == &d && known.first_row == piece.first_row && known.dtype == c.dtype &&
          known.sums.size() >= wanted) {
        return known.sums;
      }
    }
    DeviceBytes x_device(x.size() * 4), out(wanted * 8);
    x_device.upload(x);
    reference_product(out.as<double>(), x_device.as<float>() + piece.first_row * c.in_features,
                      dense(d), piece.num_rows, static_cast<int>(d.rows),
                      static_cast<int>(d.columns));
    DZ_CUDA(cudaDeviceSynchronize());
    references_.push_back({&d, piece.first_row, c.dtype, out.download<double>(wanted)});
    return references_.back().sums;
  }

  struct Reference {
    const RandomDelta* delta;
    int first_row;
    DType dtype;
    std::vector<double> sums;
  };
  std::vector<Reference> references_;
  std::vector<std::pair<const RandomDelta*, DeviceBytes>> tiled_;
  std::vector<DeviceBytes> dense_;
  int num_sms_ = 0, failures_ = 0, cases_ = 0;
  double worst_ = 0;
};

std::vector<float> random_floats(std::size_t count, std::mt19937_64& rng) {
  std::vector<float> out(count);
  for (float& v : out) {
    v = static_cast<float>(rng() % 4096) / 1024.0F - 2.0F;
    if (rng() % 300 == 0) v *= 64;
  }
  return out;
}

struct Shape {
  std::int64_t columns, rows;
  std::int32_t group_size;
};
constexpr Shape kShapes[] = {{1, 1, 32},       {100, 7, 32},      {33, 50, 64},
                             {320, 96, 96},    {640, 33, 1024},   {576, 192, 576},
                             {576, 1536, 64},  {1536, 576, 128},  {4096, 2048, 128},
                             {4096, 1024, 64}, {11008, 512, 128}, {18944, 320, 64}};
constexpr int kTokens[] = {1, 3, 5, 8, 9, 16, 33, 100};

std::string case_name(const char* what, DeltaType type, const Shape& shape) {
  return std::string(what) + std::string(name(type)) + " " + std::to_string(shape.columns) + "x" +
         std::to_string(shape.rows) + " g" + std::to_string(shape.group_size);
}

void check_shapes(Checker& checker, std::mt19937_64& rng, std::string_view filter) {
  for (int type = 0; type < 5; ++type) {
    for (const Shape& shape : kShapes) {
      const std::string base_name = case_name("", static_cast<DeltaType>(type), shape);
      if (base_name.find(filter) == std::string::npos) continue;
      const RandomDelta delta(static_cast<DeltaType>(type), shape.rows, shape.columns,
                              shape.group_size, rng);
      const std::vector<float> x =
          random_floats(static_cast<std::size_t>(100 * shape.columns), rng);
      for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
        std::vector<float> most;
        for (int i = static_cast<int>(std::size(kTokens)) - 1; i >= 0; --i) {
          const int tokens = kTokens[i];
          char what[160];
          snprintf(what, sizeof(what), "%s t%d %s", base_name.c_str(), tokens, name(dtype).data());
          Case c{{{&delta, 0, tokens, 0}}, tokens, shape.columns, shape.rows, dtype};
          const std::vector<float> y = checker.run(what, c, x);
          if (most.empty()) most = y;
          // The same noise in y and the same rows of x: bits may not depend on the batch.
          if (std::memcmp(most.data(), y.data(), y.size() * 4) != 0) {
            checker.report("%s: bits differ from those in a batch of 100", what);
          }
          if (tokens == 5 || tokens == 33) {
            c.y_dtype = dtype;
            checker.run((std::string(what) + " 16-bit y").c_str(), c, x);
            c.y_dtype = DType::kFloat32;
            const auto few = checker.run((std::string(what) + " on 7 CTAs").c_str(), c, x, 7);
            if (std::memcmp(few.data(), y.data(), y.size() * 4) != 0) {
              checker.report("%s: bits depend on how the work is shared", what);
            }
          }
        }
      }
      checker.forget();
      printf("%s: %d cases so far, %d failures, worst error %.2f of the bound\n", base_name.c_str(),
             checker.cases(), checker.failures(), checker.worst());
    }
  }
}

void check_mixtures(Checker& checker, std::mt19937_64& rng, std::string_view filter) {
  for (int round = 0; round < 12; ++round) {
    if (std::string_view("mixture").find(filter) == std::string_view::npos) return;
    const std::int64_t columns = 96 + static_cast<std::int64_t>(rng() % 20) * 200;
    std::vector<std::unique_ptr<RandomDelta>> deltas;
    Case c{{}, 0, columns, 0};
    c.dtype = round % 2 == 0 ? DType::kFloat16 : DType::kBFloat16;
    const std::int64_t q = 96 + static_cast<std::int64_t>(rng() % 500), kv = 40;
    c.out_features = q + 2 * kv;
    int row = 1;
    for (int variant = 0; variant < 9; ++variant) {
      const int tokens = static_cast<int>(rng() % 4 == 0 ? rng() % 40 : rng() % 4);
      std::int64_t offset = 0;
      for (const std::int64_t rows : {q, kv, kv}) {
        deltas.push_back(std::make_unique<RandomDelta>(static_cast<DeltaType>(rng() % 5), rows,
                                                       columns, 32 << rng() % 4, rng));
        c.pieces.push_back({rng() % 6 == 0 ? nullptr : deltas.back().get(), row, tokens, offset});
        offset += rows;
      }
      row += tokens + static_cast<int>(rng() % 2);
    }
    c.num_rows = row + 1;
    char what[80];
    snprintf(what, sizeof(what), "mixture %d, %ld columns, %d rows", round, columns, row + 1);
    checker.run(what, c, random_floats(static_cast<std::size_t>(c.num_rows * columns), rng));
    checker.forget();
  }
}

void check_add_delta(Checker& checker, std::mt19937_64& rng, std::string_view filter) {
  for (int type = 0; type < 5; ++type) {
    for (const Shape& shape : kShapes) {
      if (shape.columns > 2000) continue;
      const std::string what = case_name("add_delta ", static_cast<DeltaType>(type), shape);
      if (what.find(filter) == std::string::npos) continue;
      const RandomDelta delta(static_cast<DeltaType>(type), shape.rows, shape.columns,
                              shape.group_size, rng);
      for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
        std::vector<std::uint16_t> weight(delta.dense.size());
        for (auto& w : weight) w = to_bits(static_cast<float>(rng() % 100) / 1000.0F, dtype);
        DeviceBytes w_device(weight.size() * 2), out(weight.size() * 2 + 256);
        w_device.upload(weight);
        const cuda::AddDeltaLaunch launch{w_device.as<void>(),
                                          {checker.tiled(delta).as<void>(), delta.type,
                                           delta.group_size, delta.rows, delta.columns},
                                          out.as<void>(),
                                          dtype};
        cuda::launch_add_delta(launch, nullptr);
        DZ_CUDA(cudaDeviceSynchronize());
        const auto got = out.download<std::uint16_t>(weight.size() + 128);
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < weight.size(); ++i) {
          wrong += got[i] != to_bits(from_bits(weight[i], dtype) + delta.dense[i], dtype);
        }
        for (std::size_t i = 0; i < 128; ++i) wrong += got[weight.size() + i] != 0xFFFF;
        if (wrong > 0) {
          checker.report("%s %s: %zu wrong", what.c_str(), name(dtype).data(), wrong);
        }
      }
      checker.forget();
    }
  }
}

}  // namespace

int verify_sbmm(std::string_view filter) {
  std::mt19937_64 rng(20250123);
  Checker checker;
  if (std::string_view("fixed_point").find(filter) != std::string_view::npos) {
    const int wrong = check_fixed_point();
    if (wrong > 0) checker.report("fixed_point: %d values at the ends of the range", wrong);
  }
  check_mixtures(checker, rng, filter);
  printf("mixtures: %d cases, %d failures\n", checker.cases(), checker.failures());
  check_shapes(checker, rng, filter);
  check_add_delta(checker, rng, filter);
  printf("%s: %d cases, %d failures\n", checker.failures() == 0 ? "PASS" : "FAIL", checker.cases(),
         checker.failures());
  return checker.failures();
}

}  // namespace deltazip::bench
