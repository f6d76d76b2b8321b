// What the bindings of the CPU kernels need: all of a tensor can be read.
#pragma once

#include "core/host_values.h"
#include "cpu/kernels.h"
