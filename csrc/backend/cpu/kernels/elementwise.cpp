// bias_add and silu_mul.

#include "backend/cpu/kernels/table.h"
#include "backend/cpu/kernels/vec.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

// gate / (1 + e^-gate) * up
DZ_INLINE F32 silu_times(F32 gate, F32 up) {
  const F32 one = set1(1.0F);
  return mul(div(gate, add(one, exp(sub(zero(), gate)))), up);
}

}  // namespace

void bias_add(const BiasAddParams& params, std::int64_t first, std::int64_t last) {
  for (std::int64_t row = first; row < last; ++row) {
    const float* bias = params.row_biases[row];
    if (bias == nullptr) continue;
    float* y = static_cast<float*>(params.y) + row * params.size;
    std::int64_t i = 0;
    for (; i + kLanes <= params.size; i += kLanes) store(y + i, add(load(y + i), load(bias + i)));
    if (const int rest = static_cast<int>(params.size - i); rest > 0) {
      store_first(y + i, add(load_first(y + i, rest), load_first(bias + i, rest)), rest);
    }
  }
}

void silu_mul(const SiluMulParams& params, std::int64_t first, std::int64_t last) {
  for (std::int64_t row = first; row < last; ++row) {
    const float* gate = static_cast<const float*>(params.gate_up) + row * 2 * params.size;
    const float* up = gate + params.size;
    float* out = static_cast<float*>(params.out) + row * params.size;
    std::int64_t i = 0;
    for (; i + kLanes <= params.size; i += kLanes) {
      store(out + i, silu_times(load(gate + i), load(up + i)));
    }
    if (const int rest = static_cast<int>(params.size - i); rest > 0) {
      store_first(out + i, silu_times(load_first(gate + i, rest), load_first(up + i, rest)), rest);
    }
  }
}

}  // namespace deltazip::cpu::DZ_ISA
