#include "deltazip/engine/engine.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"

namespace deltazip::bindings {

void bind_engine(pybind11::module_& module) {
  namespace py = pybind11;
  // The engine's thread never asks for the GIL, so every call may work or wait without it.
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Engine>(module, "Engine", "One thread that serves a base and its variants.",
                     py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const EngineConfig& config) { return std::make_unique<Engine>(config); }),
           py::arg("config"), Unlocked())
      .def("add_variant", &Engine::add_variant, py::arg("name"), py::arg("path"), Unlocked())
      .def("remove_variant", &Engine::remove_variant, py::arg("name"), Unlocked())
      .def("is_draining", &Engine::is_draining, py::arg("name"), Unlocked())
      .def("variants", &Engine::variants, Unlocked())
      .def(
          "submit",
          [](Engine& self, std::int64_t request_id, std::string variant,
             std::vector<std::int32_t> prompt, SamplingParams sampling, std::int32_t priority,
             std::string cache_salt) {
            self.submit({request_id, std::move(variant), std::move(prompt), std::move(sampling),
                         priority, std::move(cache_salt)});
          },
          py::arg("request_id"), py::arg("variant"), py::arg("prompt"), py::arg("sampling"),
          py::arg("priority") = 0, py::arg("cache_salt") = "", Unlocked())
      .def(
          "cancel",
          [](Engine& self, std::int64_t request_id, std::optional<std::int32_t> choice) {
            choice ? self.cancel(request_id, *choice) : self.cancel(request_id);
          },
          py::arg("request_id"), py::arg("choice") = py::none(), Unlocked())
      .def("poll", &Engine::poll, py::arg("max_events") = 256, py::arg("timeout_ms") = 100,
           Unlocked())
      .def("stats", &Engine::stats, Unlocked())
      .def("capacity", &Engine::capacity, Unlocked())
      .def("set_prefill_chunk_tokens", &Engine::set_prefill_chunk_tokens, py::arg("num_tokens"),
           Unlocked())
      .def("config", [](const Engine& self) { return self.config(); })
      .def("base_digest", &Engine::base_digest)
      .def("model_config_json", &Engine::model_config_json)
      .def("vocab_size", &Engine::vocab_size)
      .def("device_description", &Engine::device_description)
      .def("check", &Engine::check, Unlocked())
      .def("shutdown", &Engine::shutdown, Unlocked());
}

}  // namespace deltazip::bindings
