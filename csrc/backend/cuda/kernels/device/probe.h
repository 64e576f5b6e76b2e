#pragma once

namespace deltazip::cuda {

// What the kernels' code for the current device was compiled for: 80, 90, ...; 0: this build holds
// none. It may be older than the device, and then knows nothing that came later.
int code_architecture();

// Whether that code has clusters, the copy engine and dependent launches.
inline bool runs_hopper_code() { return code_architecture() >= 90; }

}  // namespace deltazip::cuda
