#include "bindings/bindings.h"
#include "deltazip/engine/engine.h"

namespace deltazip::bindings {

void bind_stats(pybind11::module_& module) {
  namespace py = pybind11;
  using V = VariantInfo;
  py::class_<V>(module, "VariantInfo", "One variant as served; counters since it was added.")
      .def_readonly("name", &V::name)
      .def_readonly("path", &V::path)
      .def_readonly("parent", &V::parent)
      .def_readonly("content_digest", &V::content_digest)
      .def_readonly("state", &V::state)
      .def_readonly("file_bytes", &V::file_bytes)
      .def_readonly("device_bytes", &V::device_bytes)
      .def_readonly("num_requests", &V::num_requests)
      .def_readonly("num_running", &V::num_running)
      .def_readonly("num_waiting", &V::num_waiting)
      .def_readonly("num_prompt_tokens", &V::num_prompt_tokens)
      .def_readonly("num_output_tokens", &V::num_output_tokens)
      .def_readonly("num_loads", &V::num_loads)
      .def_readonly("num_evictions", &V::num_evictions)
      .def_readonly("load_seconds", &V::load_seconds)
      .def_readonly("manifest_json", &V::manifest_json);

  py::class_<CapacityRow>(module, "CapacityRow", "One line of the memory budget.")
      .def_readonly("what", &CapacityRow::what)
      .def_readonly("bytes", &CapacityRow::bytes)
      .def_readonly("detail", &CapacityRow::detail);

  using E = EngineStats;
  py::class_<E> stats(module, "EngineStats", "Counters since the start, and the state now.");
  stats.def_readonly("num_steps", &E::num_steps)
      .def_readonly("num_prompt_tokens", &E::num_prompt_tokens)
      .def_readonly("num_output_tokens", &E::num_output_tokens)
      .def_readonly("num_requests", &E::num_requests)
      .def_readonly("num_finished", &E::num_finished)
      .def_readonly("num_cancelled", &E::num_cancelled)
      .def_readonly("num_errors", &E::num_errors)
      .def_readonly("seconds_since_progress", &E::seconds_since_progress)
      .def_readonly("last_step_seconds", &E::last_step_seconds)
      .def_readonly("is_alive", &E::is_alive)
      .def_readonly("failure", &E::failure);
  // The scheduler's numbers stand beside the engine's: Python need not know who counts.
  const auto add = [&](const char* name, auto SchedulerStats::* member) {
    stats.def_property_readonly(name, [member](const E& self) { return self.scheduler.*member; });
  };
  add("num_waiting", &SchedulerStats::num_waiting);
  add("num_running", &SchedulerStats::num_running);
  add("num_blocks", &SchedulerStats::num_blocks);
  add("num_free_blocks", &SchedulerStats::num_free_blocks);
  add("num_preemptions", &SchedulerStats::num_preemptions);
  add("prefix_hit_tokens", &SchedulerStats::prefix_hit_tokens);
  add("prefix_query_tokens", &SchedulerStats::prefix_query_tokens);
}

}  // namespace deltazip::bindings
