// residual += x; out = residual / rms(residual) * gain.

#include "backend/cpu/kernels/table.h"
#include "backend/cpu/kernels/vec.h"

namespace deltazip::cpu::DZ_ISA {

void rms_norm(const RmsNormParams& params, std::int64_t first, std::int64_t last) {
  const std::int64_t size = params.hidden_size;
  const std::int64_t whole = size / kLanes * kLanes;
  const int rest = static_cast<int>(size - whole);
  for (std::int64_t row = first; row < last; ++row) {
    float* residual = static_cast<float*>(params.residual) + row * size;
    float* out = static_cast<float*>(params.out) + row * size;
    const float* gain = params.row_gains[row];
    F32 squares = zero();
    if (params.x != nullptr) {
      const float* x = static_cast<const float*>(params.x) + row * size;
      for (std::int64_t i = 0; i < whole; i += kLanes) {
        const F32 sum = add(load(residual + i), load(x + i));
        store(residual + i, sum);
        squares = fma(sum, sum, squares);
      }
      if (rest > 0) {
        const F32 sum = add(load_first(residual + whole, rest), load_first(x + whole, rest));
        store_first(residual + whole, sum, rest);
        squares = fma(sum, sum, squares);
      }
    } else {
      for (std::int64_t i = 0; i < whole; i += kLanes) {
        const F32 value = load(residual + i);
        squares = fma(value, value, squares);
      }
      if (rest > 0) {
        const F32 value = load_first(residual + whole, rest);
        squares = fma(value, value, squares);
      }
    }
    const float mean = reduce_add(squares) / static_cast<float>(size);
    const F32 scale = set1(1.0F / __builtin_sqrtf(mean + params.epsilon));
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      store(out + i, mul(mul(load(residual + i), scale), load(gain + i)));
    }
    if (rest > 0) {
      const F32 value = mul(load_first(residual + whole, rest), scale);
      store_first(out + whole, mul(value, load_first(gain + whole, rest)), rest);
    }
  }
}

}  // namespace deltazip::cpu::DZ_ISA
