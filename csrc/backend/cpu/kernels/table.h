#pragma once

// The kernels of the ISA this file is compiled for (DZ_ISA).

#include "backend/cpu/kernels/kernels.h"

namespace deltazip::cpu::DZ_ISA {

void linear(const LinearParams& params, std::int64_t first_panel, std::int64_t last_panel,
            float* scratch);
std::int64_t linear_scratch_floats(std::int64_t columns);
void sbmm(const SbmmItem& item, float* scratch);
std::int64_t sbmm_scratch_floats(const DeltaMatrix& delta);
void sbmm_ternary(const SbmmItem& item, float* scratch);
void sbmm_sign(const SbmmItem& item, float* scratch);
void bias_add(const BiasAddParams& params, std::int64_t first, std::int64_t last);
void rms_norm(const RmsNormParams& params, std::int64_t first, std::int64_t last);
void silu_mul(const SiluMulParams& params, std::int64_t first, std::int64_t last);
void rope_append(const RopeAppendParams& params, std::int64_t first, std::int64_t last);
void attention(const AttentionItem& item, float* scratch);
std::int64_t attention_scratch_floats(const PagedAttentionParams& params);
LogitSummary summarise_logits(const float* logits, std::int64_t size);
std::int64_t argmax(const float* values, std::int64_t size);
std::int64_t count_greater(const float* values, std::int64_t size, float bound);
double exp_scaled(float* out, const float* values, std::int64_t size, float max,
                  float inverse_temperature);
std::int64_t collect_greater(std::int32_t* indices, const float* values, std::int64_t size,
                             float bound);

}  // namespace deltazip::cpu::DZ_ISA
