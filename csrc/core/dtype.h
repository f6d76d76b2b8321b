// The dtypes of values, as kernels see them.
#pragma once

#include "core/portable.h"

namespace bnbops {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

}  // namespace bnbops

BNBOPS_NAMESPACE_BEGIN

BNBOPS_HD constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

BNBOPS_NAMESPACE_END
