// One launch for any number of tensors. Each has a record in the device's memory, with the range [first, end) of the
// units of work that are its own among those of all; a warp finds the tensor that its unit belongs to.
#pragma once

#include "core/layout.h"
#include "cuda/threads.h"

namespace bnbops::cuda {

BNBOPS_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
BNBOPS_DEVICE int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }

// Items on their way to the device as a kernel's argument. Every device here takes 32,764 bytes of arguments.
template <class Item>
struct Batch {
  static constexpr int kMost = (28 << 10) / sizeof(Item);
  int first, count;
  Item item[kMost];
};

// Calls launch(batch) until all items are in one.
template <class Item, class Launch>
void in_batches(const Item* items, int count, const Launch& launch) {
  Batch<Item> batch;
  for (batch.first = 0; batch.first < count; batch.first += batch.count) {
    batch.count = count - batch.first < batch.kMost ? count - batch.first : batch.kMost;
    for (int i = 0; i < batch.count; ++i) batch.item[i] = items[batch.first + i];
    launch(batch);
  }
}

template <class Record>
struct Many {
  const Record* record;
  int count;
  int64_t units;  // of all of them
};

// Number of the last record whose first unit is at most `unit`; it is not before `low`. A warp looks at 32 at a time.
template <class Record>
BNBOPS_DEVICE int find_record(const Many<Record>& many, int low, int64_t unit) {
  int high = many.count;
  while (high - low > 1) {
    const int stride = (high - low + kWarp - 1) / kWarp, probe = low + lane_of_warp() * stride;
    const bool reached = probe < high && many.record[probe].first <= unit;
    low += (__popc(__ballot_sync(kAllLanes, reached)) - 1) * stride;
    high = high - low < stride ? high : low + stride;
  }
  return low;
}

// Zeros a record, padding and all, before its members are written: copy_record reads every byte. Volatile, or the
// compiler would leave out what no member lies in.
template <class Record>
BNBOPS_DEVICE void clear_record(Record& record) {
  static_assert(sizeof(Record) % sizeof(uint32_t) == 0 && alignof(Record) >= alignof(uint32_t));
  auto* words = reinterpret_cast<volatile uint32_t*>(&record);
#pragma unroll
  for (unsigned i = 0; i < sizeof(Record) / sizeof(uint32_t); ++i) words[i] = 0;
}

// Lanes copy a record to shared memory together.
template <class Record>
BNBOPS_DEVICE void copy_record(const Record& from, Record& to) {
  static_assert(sizeof(Record) % sizeof(uint32_t) == 0 && alignof(Record) >= alignof(uint32_t));
  __syncwarp();  // no lane reads the last one any more
  for (unsigned i = lane_of_warp(); i < sizeof(Record) / sizeof(uint32_t); i += kWarp) {
    reinterpret_cast<uint32_t*>(&to)[i] = reinterpret_cast<const uint32_t*>(&from)[i];
  }
  __syncwarp();
}

// Calls visit(record, unit) for this warp's units, counted within their tensor. `records` is shared memory, one for
// each warp. A thread block has a run of units, which its warps take in turn: neighbours in memory at the same time.
template <class Record, class Visit>
BNBOPS_DEVICE void for_units(const Many<Record>& many, Record (&records)[kWarps], const Visit& visit) {
  Record& record = records[warp_of_block()];
  const int64_t groups = divide_up(many.units, kWarps);
  const int64_t begin = groups * blockIdx.x / gridDim.x * kWarps;
  int64_t end = groups * (blockIdx.x + 1) / gridDim.x * kWarps;
  if (end > many.units) end = many.units;
  int64_t next = 0;  // first unit of the tensor that comes next
  int at = 0;
  for (int64_t unit = begin + warp_of_block(); unit < end; unit += kWarps) {
    if (unit >= next) {
      at = find_record(many, at, unit);
      copy_record(many.record[at], record);
      next = record.end;
    }
    visit(record, unit - record.first);
  }
}

inline dim3 grid_of_units(int64_t units, int resident = kResident) {
  return grid_of(divide_up(units, kWarps), resident);
}

}  // namespace bnbops::cuda
