// Which rows of U a projection makes, and which layers take them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "projection.h"

namespace dfa {

// The order of layers, which is that in which the transpose adds them up. Equal ones stay as given.
inline bool comes_before(const Layer& a, const Layer& b) {
  return std::make_tuple(a.row_offset, a.size, a.scale) <
         std::make_tuple(b.row_offset, b.size, b.scale);
}

// The union of the layers' rows, cut into tasks of at most `task_rows` consecutive rows. No task
// crosses a multiple of 2^32, so the upper half of the row number is constant within a task.
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

  explicit RowPlan(std::vector<Layer> layers) : layers_(std::move(layers)) {
    std::stable_sort(layers_.begin(), layers_.end(), comes_before);
    uint64_t reach = 0;
    for (const Layer& layer : layers_) {
      written_ += layer.size;
      add(std::max(reach, layer.row_offset), layer.end());
      reach = std::max(reach, layer.end());
      reach_.push_back(reach);
    }
  }

  void cut(int64_t task_rows) {
    task_rows_ = task_rows;
    tasks_ = 0;
    for (Interval& interval : intervals_) {
      interval.first_task = tasks_;
      tasks_ += divide_up(interval.rows, task_rows);
    }
  }

  int64_t rows() const { return rows_; }
  int64_t written() const { return written_; }  // the sum of the layers' sizes
  int64_t tasks() const { return tasks_; }

  // What a kernel needs to find tasks and their layers itself.
  const std::vector<Interval>& intervals() const { return intervals_; }
  const std::vector<Layer>& layers() const { return layers_; }   // by row_offset
  const std::vector<uint64_t>& reach() const { return reach_; }  // furthest end of layers 0..i

  Task task(int64_t index) const {
    const auto after = std::upper_bound(
        intervals_.begin(), intervals_.end(), index,
        [](int64_t task, const Interval& interval) { return task < interval.first_task; });
    const Interval& interval = *(after - 1);
    const int64_t skipped = (index - interval.first_task) * task_rows_;
    return {interval.row + static_cast<uint64_t>(skipped),
            std::min(task_rows_, interval.rows - skipped)};
  }

  // Calls use(layer, begin, end) for each layer that has rows [begin, end) of the task.
  template <class Use>
  void for_each_layer(const Task& task, const Use& use) const {
    const uint64_t task_end = task.row + static_cast<uint64_t>(task.rows);
    const auto after =
        std::lower_bound(layers_.begin(), layers_.end(), task_end,
                         [](const Layer& layer, uint64_t row) { return layer.row_offset < row; });
    // reach_ never decreases: once it ends before the task, so does every earlier layer.
    for (size_t i = static_cast<size_t>(after - layers_.begin()); i-- > 0;) {
      if (reach_[i] <= task.row) break;
      const Layer& layer = layers_[i];
      const uint64_t begin = std::max(layer.row_offset, task.row);
      const uint64_t end = std::min(layer.end(), task_end);
      if (begin < end) use(layer, begin, end);
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

  std::vector<Layer> layers_;
  std::vector<uint64_t> reach_;
  std::vector<Interval> intervals_;
  int64_t rows_ = 0, written_ = 0;
  int64_t task_rows_ = 1;
  int64_t tasks_ = 0;
};

}  // namespace dfa
