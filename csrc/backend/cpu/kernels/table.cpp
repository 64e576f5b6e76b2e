#include "backend/cpu/kernels/table.h"

#define DZ_JOIN_NOW(a, b) a##b
#define DZ_JOIN(a, b) DZ_JOIN_NOW(a, b)
#define DZ_QUOTE_NOW(a) #a
#define DZ_QUOTE(a) DZ_QUOTE_NOW(a)

namespace deltazip::cpu {

const Kernels& DZ_JOIN(kernels_, DZ_ISA)() {
  static constexpr Kernels kKernels{
      .name = DZ_QUOTE(DZ_ISA),
      .linear = DZ_ISA::linear,
      .linear_scratch_floats = DZ_ISA::linear_scratch_floats,
      .sbmm = DZ_ISA::sbmm,
      .sbmm_scratch_floats = DZ_ISA::sbmm_scratch_floats,
      .bias_add = DZ_ISA::bias_add,
      .rms_norm = DZ_ISA::rms_norm,
      .silu_mul = DZ_ISA::silu_mul,
      .rope_append = DZ_ISA::rope_append,
      .attention = DZ_ISA::attention,
      .attention_scratch_floats = DZ_ISA::attention_scratch_floats,
      .summarise_logits = DZ_ISA::summarise_logits,
      .argmax = DZ_ISA::argmax,
      .count_greater = DZ_ISA::count_greater,
      .exp_scaled = DZ_ISA::exp_scaled,
      .collect_greater = DZ_ISA::collect_greater,
  };
  return kKernels;
}

}  // namespace deltazip::cpu
