#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "deltazip/engine/engine.h"

namespace deltazip::bindings {

void bind_events(pybind11::module_& module) {
  namespace py = pybind11;
  using Finish = OutputEvent::Finish;
  py::native_enum<Finish>(module, "Finish", "enum.Enum", "Why a choice ended; NONE: it goes on.")
      .value("NONE", Finish::kNone)
      .value("STOP", Finish::kStop)
      .value("LENGTH", Finish::kLength)
      .value("CANCELLED", Finish::kCancelled)
      .value("ERROR", Finish::kError)
      .finalize();

  py::class_<TokenLogprobs>(module, "TokenLogprobs", "One token's log probability and rank.")
      .def_readonly("token", &TokenLogprobs::token)
      .def_readonly("logprob", &TokenLogprobs::logprob)
      .def_readonly("rank", &TokenLogprobs::rank)
      .def_readonly("top", &TokenLogprobs::top);

  py::class_<OutputEvent>(module, "OutputEvent", "What is new of one choice of one request.")
      .def_readonly("request_id", &OutputEvent::request_id)
      .def_readonly("choice", &OutputEvent::choice)
      .def_readonly("tokens", &OutputEvent::tokens)
      .def_readonly("logprobs", &OutputEvent::logprobs)
      .def_readonly("prompt_logprobs", &OutputEvent::prompt_logprobs)
      .def_readonly("finish", &OutputEvent::finish)
      .def_readonly("stop_token", &OutputEvent::stop_token)
      .def_readonly("error", &OutputEvent::error)
      .def_readonly("num_cached_prompt_tokens", &OutputEvent::num_cached_prompt_tokens);
}

}  // namespace deltazip::bindings
