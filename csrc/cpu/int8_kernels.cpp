// The table of int8 kernels. Compiled once per instruction set, with BNBOPS_ISA, BNBOPS_LANES_HEADER, BNBOPS_LANES,
// BNBOPS_DOTS_HEADER, BNBOPS_DOTS and BNBOPS_KERNELS defined by the build.
#include BNBOPS_LANES_HEADER
#include BNBOPS_DOTS_HEADER
#include "cpu/int8_multiply_kernels.h"

namespace bnbops::cpu {

extern const Int8Kernels BNBOPS_KERNELS;  // a constant: no code of one instruction set may run at load
constexpr Int8Kernels BNBOPS_KERNELS = {
    scan_rows<BNBOPS_LANES>,       encode_rows<BNBOPS_LANES, BNBOPS_DOTS>,
    dequantize_int8<BNBOPS_LANES>, quantize_columns<BNBOPS_LANES>,
    row_bytes<BNBOPS_DOTS>,        prepare<BNBOPS_DOTS>,
    BNBOPS_DOTS::kRowBlock,        multiply<BNBOPS_LANES, BNBOPS_DOTS>,
    dequantize_sums<BNBOPS_LANES>,
};

}  // namespace bnbops::cpu
