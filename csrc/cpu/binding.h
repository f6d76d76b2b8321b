// What the bindings of the CPU kernels need: all of a tensor can be read.
#pragma once

#include "cpu/kernels.h"
#include "host_values.h"
