#pragma once

namespace deltazip::cuda {

// Whether this build holds code for the current device.
bool has_kernels();

}  // namespace deltazip::cuda
