// CUDA on the CPU: .cu files compiled by a host compiler with -DCUSIM, their kernels run thread by thread as fibers.
//
// No CUDA toolkit is needed: these headers define what kernels use of it. What they leave out does not compile, on
// purpose: approximate functions (__expf, rsqrtf), whose bits a CPU cannot know, and __activemask.
//
// Blocks run one after another on one OS thread. Within a block, a thread runs until it waits for others. Environment:
//   CUSIM_ORDER=forward | reverse | random:SEED   order of blocks, of warps and of the threads of a warp
// A kernel must give the same bits in every order. What CUDA leaves undefined fails: "cusim: WHAT in kernel ...",
// abort. Out-of-bounds accesses and data races are left to the sanitizers, which know about the fibers.
//
// One build catches what another cannot: carried-over shared memory needs the plain one (see __shared__ in memory.h),
// bounds need -fsanitize=address,undefined, races that no order shows need -fsanitize=thread.
#pragma once

// IWYU pragma: begin_exports
#include "cusim/types.h"

#include "cusim/fiber.h"
#include "cusim/scheduler.h"

#include "cusim/atomics.h"
#include "cusim/launch.h"
#include "cusim/math.h"
#include "cusim/memory.h"
#include "cusim/mma.h"
#include "cusim/warp.h"
// IWYU pragma: end_exports
