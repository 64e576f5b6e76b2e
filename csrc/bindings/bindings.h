#pragma once

#include <pybind11/pybind11.h>

// One function per subject, called by module.cpp in this order.
namespace deltazip::bindings {

void bind_errors(pybind11::module_& module);
void bind_codec(pybind11::module_& module);
void bind_config(pybind11::module_& module);
void bind_sampling(pybind11::module_& module);
void bind_events(pybind11::module_& module);
void bind_stats(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace deltazip::bindings
