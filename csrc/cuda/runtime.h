// The CUDA runtime as host code needs it: streams and errors, no kernels.
#pragma once

#ifdef CUSIM
#include "cusim/types.h"
#else
#include <cuda_runtime_api.h>
#endif
