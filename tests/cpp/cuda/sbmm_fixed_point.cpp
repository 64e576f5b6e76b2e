// x in fixed point, against the same arithmetic on the host.

#include <algorithm>
#include <cmath>

#include "cuda/sbmm_cases.h"

namespace deltazip::bench {

std::uint16_t to_bits(float value, DType dtype) {
  return dtype == DType::kFloat16 ? to_half(value).bits : to_bfloat16(value).bits;
}
float from_bits(std::uint16_t bits, DType dtype) {
  return dtype == DType::kFloat16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
}

DeviceBytes fixed_point(const DeviceBytes& x_device, std::int64_t columns, DType dtype,
                        std::vector<float>& x, std::size_t& num_wrong) {
  constexpr std::size_t kGuard = 64;
  const cuda::FixedPointRow layout = cuda::fixed_point_row(columns);
  const auto rows = static_cast<std::int64_t>(x.size()) / columns;
  const std::size_t size = static_cast<std::size_t>(rows * layout.num_bytes);
  DeviceBytes out(size + kGuard);
  cuda::launch_fixed_point({x_device.as<void>(), out.as<void>(), rows, columns, columns, dtype},
                           nullptr);
  DZ_CUDA(cudaDeviceSynchronize());
  const auto bytes = out.download<std::int8_t>(size + kGuard);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int8_t* from = bytes.data() + row * layout.num_bytes;
    for (std::int64_t first = 0; first < layout.low_offset; first += cuda::kRecordColumns) {
      float* values = x.data() + row * columns + first;
      const auto count = std::min<std::int64_t>(cuda::kRecordColumns, columns - first);
      float largest = 0, scale = 0;
      for (std::int64_t k = 0; k < count; ++k) largest = std::max(largest, std::abs(values[k]));
      std::memcpy(&scale, from + layout.scales_offset + first / cuda::kRecordColumns * 4, 4);
      num_wrong += scale != largest / cuda::kFixedPointMax;
      const float factor = largest > 0 ? cuda::kFixedPointMax / largest : 0;
      for (std::int64_t k = 0; k < cuda::kRecordColumns; ++k) {
        const int q = from[first + k] * 256 + from[layout.low_offset + first + k];
        const float wanted = k < count ? std::nearbyint(values[k] * factor) : 0;
        num_wrong += static_cast<float>(q) != wanted;
        if (k >= count) continue;
        const float meant = static_cast<float>(q) * scale;
        num_wrong += std::abs(meant - values[k]) > largest * 1.6e-5F;
        values[k] = meant;
      }
    }
  }
  for (std::size_t i = 0; i < kGuard; ++i) num_wrong += bytes[size + i] != -1;
  return out;
}

int check_fixed_point() {
  constexpr std::int64_t kColumns = 200;  // of which the second record stays zero
  const cuda::FixedPointRow layout = cuda::fixed_point_row(kColumns);
  int num_wrong = 0;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const float value : {0.0F, INFINITY, -INFINITY, NAN, 6e-8F, 65504.0F, -1.0F}) {
      std::vector<std::uint16_t> x(kColumns, to_bits(0.0F, dtype));
      x[3] = to_bits(value, dtype);
      DeviceBytes x_device(x.size() * 2), out(static_cast<std::size_t>(layout.num_bytes));
      x_device.upload(x);
      cuda::launch_fixed_point({x_device.as<void>(), out.as<void>(), 1, kColumns, kColumns, dtype},
                               nullptr);
      DZ_CUDA(cudaDeviceSynchronize());
      const auto bytes = out.download<std::int8_t>(static_cast<std::size_t>(layout.num_bytes));
      float scales[2];
      std::memcpy(scales, bytes.data() + layout.scales_offset, sizeof(scales));
      const int q = bytes[3] * 256 + bytes[static_cast<std::size_t>(layout.low_offset) + 3];
      const float seen = static_cast<float>(q) * scales[0], meant = from_bits(x[3], dtype);
      const bool is_right = std::isfinite(value) ? std::abs(seen - meant) <= 1e-6F * std::abs(meant)
                                                 : std::isnan(seen);
      if (is_right && scales[1] == 0) continue;
      ++num_wrong;
      printf("FAIL fixed_point %s: %g became %g, zeros have a scale of %g\n", name(dtype).data(),
             static_cast<double>(meant), static_cast<double>(seen), static_cast<double>(scales[1]));
    }
  }
  return num_wrong;
}

}  // namespace deltazip::bench
