// What the suites share: failures, exactly sized memory, random rows.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/rows.h"

namespace check {

using fastmtl::Scalar;

extern int num_cases, num_failures;
extern bool quick;  // only the cases of f32 rows, and only up to the first failure

// Counts a failure unless error <= tolerance; a NaN is a failure.
void within(const std::string& what, double error, double tolerance);
// The larger of two errors; a NaN is larger than all.
inline double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }
void succeeded(const std::string& what, int cuda_error);

// Heap memory without slack, so that the address sanitizer sees one element too far. Filled with 0xff (NaN).
template <class T>
class Exact {
 public:
  explicit Exact(size_t size) : size_(size), data_(static_cast<T*>(malloc(size * sizeof(T))), free) {
    memset(static_cast<void*>(data_.get()), 0xff, size * sizeof(T));
  }
  explicit Exact(const std::vector<T>& values) : Exact(values.size()) {
    memcpy(static_cast<void*>(data_.get()), values.data(), values.size() * sizeof(T));
  }
  T* get() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::unique_ptr<T, void (*)(void*)> data_;
};

enum class Layout { aligned, misaligned, stacked };

struct Case {
  int num_tasks;
  std::vector<int64_t> sizes;
  Layout layout = Layout::aligned;
  bool missing = false;  // every third row
  int num_groups = 1;
  std::vector<Scalar> types = {Scalar::f32};  // of the parameters in turn
  double constant = 0;                        // all elements, if not 0

  std::string name() const;
  bool skipped() const;
};

double load(const void* row, Scalar type, int64_t i);
void store(void* row, Scalar type, int64_t i, double value);

// The rows of a case.
struct RandomRows {
  explicit RandomRows(const Case& c);
  const void* row(int64_t param, int task) const { return pointers[param * rows.num_tasks + task]; }

  fastmtl::Rows rows;
  std::vector<fastmtl::Parameter> params;
  std::vector<const void*> pointers;
  std::vector<Exact<char>> memory;
};

}  // namespace check
