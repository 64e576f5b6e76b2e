#pragma once

#include <memory>

#include "deltazip/backend/backend.h"

namespace deltazip::cpu {

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options);

}  // namespace deltazip::cpu
