// Many jobs of very different sizes, split evenly among the threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/norms/norm_math.h"

namespace bnbops::cpu {

class Schedule {
 public:
  // Adds a job of so many pieces.
  void add(int64_t pieces) {
    first_.push_back(pieces_);
    pieces_ += pieces;
  }

  // Number of a job's first piece among those of all jobs.
  int64_t first_piece(size_t job) const { return first_[job]; }
  int64_t pieces() const { return pieces_; }

  // Calls work(job, first, last) for ranges of each job's pieces; `grain` pieces are worth a thread.
  template <class Work>
  void run(int64_t grain, const Work& work) const {
    torch::stable::parallel_for(0, pieces_, grain, [&](int64_t first, int64_t last) {
      size_t job = std::upper_bound(first_.begin(), first_.end(), first) - first_.begin() - 1;
      for (; first < last; ++job) {
        const int64_t begin = first_[job];
        const int64_t end = job + 1 < first_.size() ? std::min(last, first_[job + 1]) : last;
        if (end > first) work(job, first - begin, end - begin);
        first = end;
      }
    });
  }

  // The sum of each job's pieces.
  void sum_by_job(const std::vector<double>& of_pieces, double* sums) const {
    for (size_t job = 0; job < first_.size(); ++job) {
      const int64_t end = job + 1 < first_.size() ? first_[job + 1] : pieces_;
      sums[job] = sum_in_order(of_pieces.data() + first_[job], end - first_[job]);
    }
  }

 private:
  std::vector<int64_t> first_;
  int64_t pieces_ = 0;
};

}  // namespace bnbops::cpu
