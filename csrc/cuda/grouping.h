// Products of rows with the weights of experts: which thread block multiplies what.
#pragma once

#include "core/layout.h"
#include "cuda/elements.h"
#include "cuda/kernels.h"

namespace bnbops::cuda {

// A thread block has some columns of the result, for all rows of an expert. The last ones have the rows that belong to
// no expert.
struct Part {
  int64_t expert, column;  // the first one
  int64_t row_begin, row_end;
  bool has_expert;
};

template <int kColumns>
dim3 grid_of_parts(const Grouping& grouping, int64_t columns) {
  if (grouping.rows == 0) return dim3(0);
  const int64_t experts = grouping.ends == nullptr ? 1 : grouping.experts + 1;
  return dim3(static_cast<unsigned>(experts * divide_up(columns, kColumns)));
}

// Whatever the ends are, each row belongs to exactly one part of those with the same columns: an end counts no more
// than the largest before it, nor more than there are rows.
template <int kColumns>
BNBOPS_DEVICE Part part_of_block(const Grouping& grouping, int64_t columns) {
  const int64_t parts = divide_up(columns, kColumns);
  Part part{blockIdx.x / parts, blockIdx.x % parts * kColumns, 0, grouping.rows, true};
  if (grouping.ends == nullptr) return part;
  part.has_expert = part.expert < grouping.experts;
  int before = 0;
  for (int64_t i = threadIdx.x % kWarp; i < part.expert; i += kWarp) {
    before = grouping.ends[i] > before ? grouping.ends[i] : before;
  }
  before = __reduce_max_sync(kAllLanes, before);
  part.row_begin = before < grouping.rows ? before : grouping.rows;
  if (part.has_expert) {
    const int end = grouping.ends[part.expert] > before ? grouping.ends[part.expert] : before;
    part.row_end = end < grouping.rows ? end : grouping.rows;
  }
  return part;
}

// Results of the rows that have no expert.
template <int kColumns>
BNBOPS_DEVICE void write_zeros(const Part& part, void* out, DType dtype, int64_t columns) {
  const int64_t column = part.column + threadIdx.x % kColumns;
  for (int64_t row = part.row_begin + threadIdx.x / kColumns; row < part.row_end; row += blockDim.x / kColumns) {
    if (column < columns) store_element(out, dtype, row * columns + column, 0.0F);
  }
}

}  // namespace bnbops::cuda
