#include <map>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "deltazip/engine/engine.h"

namespace deltazip::bindings {

void bind_sampling(pybind11::module_& module) {
  namespace py = pybind11;
  using S = SamplingParams;
  Fields<S> fields(module, "SamplingParams", "How one request's tokens are chosen.");
  fields.field("n", &S::n)
      .field("temperature", &S::temperature)
      .field("top_p", &S::top_p)
      .field("min_p", &S::min_p)
      .field("top_k", &S::top_k)
      .field("repetition_penalty", &S::repetition_penalty)
      .field("presence_penalty", &S::presence_penalty)
      .field("frequency_penalty", &S::frequency_penalty)
      .field("ignore_eos", &S::ignore_eos)
      .field("min_tokens", &S::min_tokens)
      .field("max_tokens", &S::max_tokens)
      .field("logprobs", &S::logprobs)
      .field("prompt_logprobs", &S::prompt_logprobs);

  const std::string owner = fields.name();
  fields.type()
      .def_property(
          "seed", [](const S& self) { return self.seed; },
          [owner](S& self, py::handle value) {
            self.seed.reset();
            if (!value.is_none()) {
              self.seed = cast_field<std::uint64_t>(owner, "seed", value,
                                                    "None or an integer in [0, 2^64)");
            }
          })
      .def_property(
          "logit_bias",
          [](const S& self) {
            std::map<std::int32_t, float> biases;
            for (const TokenBias& bias : self.logit_bias) biases[bias.token] = bias.bias;
            return biases;
          },
          [owner](S& self, py::handle value) {
            using Map = std::map<std::int32_t, float>;
            self.logit_bias.clear();
            for (const auto& [token, bias] :
                 cast_field<Map>(owner, "logit_bias", value, "a dict of token to number")) {
              self.logit_bias.push_back({token, bias});
            }
          })
      .def_property(
          "stop_token_ids", [](const S& self) { return self.stop_token_ids; },
          [owner](S& self, py::handle value) {
            self.stop_token_ids = cast_field<std::vector<std::int32_t>>(owner, "stop_token_ids",
                                                                        value, "a list of tokens");
          });
}

}  // namespace deltazip::bindings
