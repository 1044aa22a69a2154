// The rows of one parameter that take part, and their weights, listed in shared memory.
#pragma once
#include "element.h"
#include "ptx.h"
#include "table.h"

namespace fastmtl {

template <class Element>
struct Term {
  const Element* row;
  Sum<Element> weight;
};

// Warp 0 calls keep(place, task, row, weight) for the rows that are there and whose weight is not 0 (NaN is not),
// places 0, 1, .. in task order, and counts them.
template <class Element, class Keep>
__device__ __forceinline__ void select_terms(const Table& table, int p, const double* weights, int* num_terms,
                                             Keep keep) {
  if (threadIdx.x >= 32) return;
  const int num_tasks = table.num_tasks, lane = threadIdx.x;
  int count = 0;
  for (int base = 0; base < num_tasks; base += 32) {
    const int task = base + lane;
    const Element* row = nullptr;
    double weight = 0;
    if (task < num_tasks) {
      row = static_cast<const Element*>(table.rows[int64_t(p) * num_tasks + task]);
      weight = weights[int64_t(table.params[p].group) * num_tasks + task];
    }
    const bool counts = row && weight != 0;
    const unsigned ballot = __ballot_sync(~0u, counts);
    if (counts) keep(count + __popc(ballot & ((1u << lane) - 1)), task, row, weight);
    count += __popc(ballot);
  }
  if (lane == 0) *num_terms = count;
}

template <class Element>
__device__ __forceinline__ void list_terms(const Table& table, int p, const double* weights, Term<Element>* terms,
                                           int* num_terms) {
  select_terms<Element>(table, p, weights, num_terms, [&](int place, int, const Element* row, double weight) {
    terms[place] = {row, static_cast<Sum<Element>>(weight)};
  });
}

// Loads kTerms rows' columns i.. , all under way before the first is used, and calls add(k, n, x) with each element
// times its row's weight, term by term.
template <int kTerms, int N, class Element, class Add>
__device__ __forceinline__ void with_terms(const Term<Element>* terms, int64_t i, Add add) {
  Elements<Element, N> rows[kTerms];
#pragma unroll
  for (int k = 0; k < kTerms; ++k) rows[k] = Elements<Element, N>::load(in_global_memory(terms[k].row) + i);
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
#pragma unroll
    for (int n = 0; n < N; ++n) add(k, n, terms[k].weight * widen(rows[k].x[n]));
  }
}

// Runs tables(Element(), Out(), out_type) for the types of rows and outcome that there are: the rows' own, and f32 for
// those of 16 bits.
template <class Tables>
cudaError_t for_each_type(Tables tables) {
  for (Scalar type : kScalars) {
    const cudaError_t error = with_element(type, [&](auto element) {
      using Element = decltype(element);
      cudaError_t error = tables(element, element, type, type);
      if constexpr (sizeof(Element) == 2) {
        if (error == cudaSuccess) error = tables(element, float(), type, Scalar::f32);
      }
      return error;
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastmtl
