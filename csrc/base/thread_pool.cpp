#include "deltazip/base/thread_pool.h"
