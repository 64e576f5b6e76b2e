#pragma once

#include "deltazip/base/log.h"
#include "engine/resources.h"

namespace deltazip::engine {

// Runs steps without content, so that the first requests meet a device that has made, measured and
// recorded what their steps use. Does nothing where memory is shared with the host. Says what it
// did.
void warm_up(Resources& resources, const LogSink& log);

}  // namespace deltazip::engine
