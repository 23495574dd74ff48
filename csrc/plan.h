// Which rows a projection makes, and which layers want them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "projection.h"

namespace dfa {

// The union of the layers' row ranges, cut into tasks of at most `task_rows` consecutive rows. No
// task crosses a multiple of 2^32, so that the upper half of a row number is constant within one.
class RowPlan {
 public:
  struct Task {
    uint64_t row;
    int64_t rows;
  };

  struct Interval {
    uint64_t row;
    int64_t rows;
    int64_t first_task;
  };

  explicit RowPlan(std::vector<Range> ranges) : ranges_(std::move(ranges)) {
    std::sort(ranges_.begin(), ranges_.end(),
              [](const Range& a, const Range& b) { return a.row_offset < b.row_offset; });
    uint64_t reach = 0;
    for (const Range& r : ranges_) {
      written_ += r.size;
      const uint64_t end = r.row_offset + static_cast<uint64_t>(r.size);
      add(std::max(reach, r.row_offset), end);
      reach = std::max(reach, end);
      reach_.push_back(reach);
    }
  }

  void cut(int64_t task_rows) {
    task_rows_ = task_rows;
    tasks_ = 0;
    for (Interval& interval : intervals_) {
      interval.first_task = tasks_;
      tasks_ += (interval.rows + task_rows - 1) / task_rows;
    }
  }

  int64_t rows() const { return rows_; }
  int64_t written() const { return written_; }  // the sum of the ranges' sizes
  int64_t tasks() const { return tasks_; }

  // What a kernel needs to find tasks and their layers by itself.
  const std::vector<Interval>& intervals() const { return intervals_; }
  const std::vector<Range>& ranges() const { return ranges_; }   // by row_offset
  const std::vector<uint64_t>& reach() const { return reach_; }  // furthest end of ranges 0..i

  Task task(int64_t index) const {
    const auto after = std::upper_bound(
        intervals_.begin(), intervals_.end(), index,
        [](int64_t task, const Interval& interval) { return task < interval.first_task; });
    const Interval& interval = *(after - 1);
    const int64_t skipped = (index - interval.first_task) * task_rows_;
    return {interval.row + static_cast<uint64_t>(skipped),
            std::min(task_rows_, interval.rows - skipped)};
  }

  // Calls use(range, begin, end) for each layer that wants rows [begin, end) of the task.
  template <class Use>
  void for_each_layer(const Task& task, const Use& use) const {
    const uint64_t task_end = task.row + static_cast<uint64_t>(task.rows);
    const auto after =
        std::lower_bound(ranges_.begin(), ranges_.end(), task_end,
                         [](const Range& range, uint64_t row) { return range.row_offset < row; });
    // reach_ never decreases: once it is behind the task, so is every earlier range.
    for (size_t i = static_cast<size_t>(after - ranges_.begin()); i-- > 0;) {
      if (reach_[i] <= task.row) break;
      const Range& range = ranges_[i];
      const uint64_t begin = std::max(range.row_offset, task.row);
      const uint64_t end = std::min(range.row_offset + static_cast<uint64_t>(range.size), task_end);
      if (begin < end) use(range, begin, end);
    }
  }

 private:
  void add(uint64_t begin, uint64_t end) {
    while (begin < end) {
      const uint64_t boundary = ((begin >> 32) + 1) << 32;
      const uint64_t stop = std::min(end, boundary);
      const int64_t rows = static_cast<int64_t>(stop - begin);
      const bool extends = !intervals_.empty() && begin % (uint64_t{1} << 32) != 0 &&
                           intervals_.back().row + intervals_.back().rows == begin;
      if (extends) {
        intervals_.back().rows += rows;
      } else {
        intervals_.push_back({begin, rows, 0});
      }
      rows_ += rows;
      begin = stop;
    }
  }

  std::vector<Range> ranges_;
  std::vector<uint64_t> reach_;
  std::vector<Interval> intervals_;
  int64_t rows_ = 0, written_ = 0;
  int64_t task_rows_ = 1;
  int64_t tasks_ = 0;
};

}  // namespace dfa
