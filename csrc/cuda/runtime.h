// The CUDA runtime as host code needs it: streams, errors and memory, no kernels.
#pragma once

#ifdef CUSIM
#include "cusim/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif
