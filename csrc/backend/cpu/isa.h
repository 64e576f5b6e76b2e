#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "backend/cpu/kernels/kernels.h"

namespace deltazip::cpu {

// Names of the ISAs that this build has and this machine runs, worst first: "scalar", ...
std::vector<std::string> available_isas();

// `isa` empty: the best. Throws InvalidArgument naming what is available.
const Kernels& choose_kernels(std::string_view isa);

}  // namespace deltazip::cpu
