#include "rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace deltazip {
namespace {

// Correctly rounded where libm's powf may be an ulp off: at position 8192 an ulp is 5e-4 radians.
float power(float base, float exponent) {
  return static_cast<float>(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
}

// theta^(2i / head_dim) for i in [0, head_dim / 2).
std::vector<float> wavelengths(float theta, std::int32_t head_dim) {
  std::vector<float> out(static_cast<std::size_t>(head_dim) / 2);
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = power(theta, static_cast<float>(2 * i) / static_cast<float>(head_dim));
  }
  return out;
}

std::vector<float> plain_frequencies(float theta, std::int32_t head_dim) {
  std::vector<float> out = wavelengths(theta, head_dim);
  for (float& value : out) value = 1.0F / value;
  return out;
}

void scale_llama3(std::vector<float>& frequencies, const RopeConfig& rope) {
  const auto old_length = static_cast<double>(rope.original_max_positions);
  const auto low_wavelength = static_cast<float>(old_length / rope.low_freq_factor);
  const auto high_wavelength = static_cast<float>(old_length / rope.high_freq_factor);
  const auto factor = static_cast<float>(rope.factor);
  const auto low = static_cast<float>(rope.low_freq_factor);
  const auto range = static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
  for (float& value : frequencies) {
    const float wavelength = static_cast<float>(2.0 * std::numbers::pi) / value;
    if (wavelength > low_wavelength) {
      value /= factor;
    } else if (wavelength >= high_wavelength) {
      const float smooth = (static_cast<float>(old_length) / wavelength - low) / range;
      value = (1.0F - smooth) * value / factor + smooth * value;
    }
  }
}

// YaRN, section 3.2: frequencies that turn often are kept, those that never finish a turn are
// interpolated, with a ramp between. The bounds of the ramp are in units of frequency index.
std::vector<float> yarn_frequencies(const RopeConfig& rope, std::int32_t head_dim) {
  const double dim = head_dim;
  const auto index_of_rotations = [&](double rotations) {
    return dim *
           std::log(static_cast<double>(rope.original_max_positions) /
                    (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(rope.theta));
  };
  double low = index_of_rotations(rope.beta_fast), high = index_of_rotations(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;

  std::vector<float> out = wavelengths(static_cast<float>(rope.theta), head_dim);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const float kept = 1.0F / out[i];
    const float interpolated = 1.0F / (static_cast<float>(rope.factor) * out[i]);
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0F,
        1.0F);
    const float keep = 1.0F - ramp;
    out[i] = interpolated * (1.0F - keep) + kept * keep;
  }
  return out;
}

double yarn_attention_factor(const RopeConfig& rope) {
  if (rope.attention_factor != 0.0) return rope.attention_factor;
  const auto scale = [&](double mscale) {
    return rope.factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(rope.factor) + 1.0;
  };
  if (rope.mscale != 0.0 && rope.mscale_all_dim != 0.0) {
    return scale(rope.mscale) / scale(rope.mscale_all_dim);
  }
  return scale(1.0);
}

}  // namespace

Rope::Rope(const ModelConfig& config)
    : rope_(config.rope), head_dim_(config.head_dim), max_positions_(config.max_positions) {
  if (rope_.scaling == RopeScaling::kYarn) {
    frequencies_ = yarn_frequencies(rope_, head_dim_);
    attention_factor_ = static_cast<float>(yarn_attention_factor(rope_));
    return;
  }
  frequencies_ = plain_frequencies(static_cast<float>(rope_.theta), head_dim_);
  if (rope_.scaling == RopeScaling::kLinear) {
    for (float& value : frequencies_) value /= static_cast<float>(rope_.factor);
  } else if (rope_.scaling == RopeScaling::kLlama3) {
    scale_llama3(frequencies_, rope_);
  }
}

bool Rope::depends_on_length(std::int64_t length) const {
  return rope_.scaling == RopeScaling::kDynamic && length > max_positions_;
}

// NTK-aware: the base grows with the length, so that the slowest frequency just fits it.
std::vector<float> Rope::frequencies_at(std::int64_t length) const {
  const auto factor = static_cast<float>(rope_.factor);
  const float stretch = factor * static_cast<float>(length) / static_cast<float>(max_positions_) -
                        static_cast<float>(rope_.factor - 1.0);
  const double exponent = static_cast<double>(head_dim_) / static_cast<double>(head_dim_ - 2);
  const float theta =
      static_cast<float>(rope_.theta) * power(stretch, static_cast<float>(exponent));
  return plain_frequencies(theta, head_dim_);
}

void Rope::write_angles(std::int64_t position, std::int64_t length, std::span<float> out) const {
  std::span<const float> frequencies = frequencies_;
  if (depends_on_length(length)) {
    if (cached_length_ != length) {
      cached_frequencies_ = frequencies_at(length);
      cached_length_ = length;
    }
    frequencies = cached_frequencies_;
  }
  const std::size_t half = frequencies.size();
  for (std::size_t i = 0; i < half; ++i) {
    const float rounded = frequencies[i] * static_cast<float>(position);
    const double angle = rounded;
    out[i] = static_cast<float>(std::cos(angle)) * attention_factor_;
    out[half + i] = static_cast<float>(std::sin(angle)) * attention_factor_;
  }
}

}  // namespace deltazip
