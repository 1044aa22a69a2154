// Gramian on the CPU: M[k] = sum over the parameters of group k of G G^T, G being the parameter's T rows.
//
// Traffic: one read of the rows. Arithmetic: T (T + 1) / 2 multiply-adds per column. fp32, bf16 and fp16 are multiplied
// and added in fp32 vectors, at most 512 columns at a time, whose sums are then added in fp64; fp64 throughout in fp64.
//
// The columns of all parameters, ordered by group, are cut into jobs. A job takes its columns in chunks that stay in
// the caches and fills the lower triangle tile by tile, each tile a block of dot products held in registers. Chunks are
// read where they lie, except what is shorter than a chunk (small parameters, ends), and 16-bit rows if there are many
// (they would be widened once per tile): these are collected, widened, in a panel of one chunk. The first job of a
// group writes into M itself, each later one into a partial sum of its own; these are added in order.
//
// Few rows are bound by memory: up to 8, short chunks are near enough to reading all rows abreast for the hardware to
// prefetch them; beyond that, the tiles prefetch the next chunk.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cpu.h"
#include "dispatch.h"
#include "partition.h"

namespace fastmtl {
namespace {

constexpr int kMaxBlock = 5;

// What a tile prefetches: n elements of `element` bytes each from two places, n being its number of columns.
struct Ahead {
  const char* place[2];
  int64_t element;
};

// The kernels of gram_kernels.h for one element type, with blocks of `block` rows.
struct TileSet {
  int block;
  int sums;  // doubles that a tile adds to
  // By the number of rows of a, less 1.
  void (*tile[kMaxBlock])(const void* const* a, const void* const* b, int64_t n, Ahead, double* out);
  void (*triangle[kMaxBlock])(const void* const* a, int64_t n, Ahead, double* out);
};

struct GramKernels {
  int lanes;         // of a vector of floats
  TileSet small[4];  // by Scalar; for few rows
  TileSet large[2];  // f32 and f64
  void (*widen[4])(const void* from, int64_t n, void* to);
};

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "gram_kernels.h"
#include "each_target.h"

namespace fastmtl {
namespace {

const GramKernels& gram_kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return avx512::kGramKernels;
  if (capability() == Capability::avx2) return avx2::kGramKernels;
#endif
  return portable::kGramKernels;
}

constexpr int kSmallRows = 16;   // up to here small blocks, and 16-bit rows are read where they lie
constexpr int kAbreastRows = 8;  // up to here the hardware prefetches

// Bytes of one row, as fp32 or fp64. Short chunks lose time where the lanes are summed; long ones leave the caches, and
// their sums lose accuracy.
constexpr int64_t kMaxChunkBytes = 2048;
constexpr int64_t chunk_bytes(int num_rows) {
  return num_rows <= 4 || num_rows > kSmallRows ? kMaxChunkBytes : num_rows <= kAbreastRows ? 512 : 768;
}

// Uninitialized memory that begins at a cache line.
template <class T>
class CacheAligned {
 public:
  explicit CacheAligned(int64_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

// One line more than a chunk: room for a whole vector at its end, and the rows lie in different cache sets.
constexpr int64_t panel_stride(int64_t chunk_bytes) { return chunk_bytes + 64; }

int64_t sums_needed(const TileSet& set, int64_t num_rows) {
  const int64_t blocks = (num_rows + set.block - 1) / set.block;
  return blocks * (blocks + 1) / 2 * set.sums;
}

// Adds the Gramian of one range of columns after the other to matrices in memory. Owns the scratch memory of a worker.
class RangeGramian {
 public:
  RangeGramian(const GramKernels& kernels, int num_tasks)
      : kernels_(kernels),
        num_tasks_(num_tasks),
        sums_(std::max(sums_needed(kernels.small[0], std::min(num_tasks, kSmallRows)),
                       sums_needed(kernels.large[0], num_tasks))),
        panel_(num_tasks * panel_stride(kMaxChunkBytes)),
        rows_(3 * num_tasks) {
    tasks_.reserve(num_tasks);
    present_.reserve(num_tasks);
  }

  // out[a][b] += <row a, row b> over the elements [begin, end) of the parameter, a >= b. Takes effect with finish().
  void add(const Parameter& parameter, int64_t begin, int64_t end, double* out) {
    if (begin >= end) return;
    present_.clear();
    for (int t = 0; t < num_tasks_; ++t) {
      if (parameter.rows[t] != nullptr) present_.push_back(t);
    }
    if (present_.empty()) return;
    const bool is_double = parameter.type == Scalar::f64;
    if (out != out_ || is_double != is_double_ || present_ != tasks_) {
      finish();
      start(is_double, out);
    }
    add_columns(parameter, begin, end);
  }

  void finish() {
    if (out_ == nullptr) return;
    if (filled_ > 0) multiply_panel();
    scatter();
    out_ = nullptr;
  }

 private:
  int num_rows() const { return static_cast<int>(tasks_.size()); }
  bool is_small() const { return num_rows() <= kSmallRows; }
  const TileSet& tiles(Scalar type) const { return (is_small() ? kernels_.small : kernels_.large)[int(type)]; }
  Scalar panel_type() const { return is_double_ ? Scalar::f64 : Scalar::f32; }
  int64_t panel_element() const { return element_size(panel_type()); }
  char* panel_row(int r) { return panel_.get() + r * panel_stride(chunk_bytes(num_rows())); }

  // Begins sums over the rows `present_`.
  void start(bool is_double, double* out) {
    tasks_ = present_;
    is_double_ = is_double;
    out_ = out;
    chunk_ = chunk_bytes(num_rows()) / panel_element();
    std::fill_n(sums_.get(), sums_needed(tiles(panel_type()), num_rows()), 0.0);
  }

  void add_columns(const Parameter& parameter, int64_t begin, int64_t end) {
    const int n = num_rows();
    const int64_t size = element_size(parameter.type);
    const void** rows = rows_.data();
    auto seek = [&](int64_t column) {
      for (int r = 0; r < n; ++r) rows[r] = static_cast<const char*>(parameter.rows[tasks_[r]]) + column * size;
    };
    int64_t column = begin;
    if (size >= 4 || is_small()) {
      for (; end - column >= chunk_; column += chunk_) {
        seek(column);
        multiply(tiles(parameter.type), rows, chunk_, next_chunk(parameter, column + chunk_, chunk_));
      }
    }
    while (column < end) {
      const int64_t taken = std::min(end - column, chunk_ - filled_);
      seek(column);
      for (int r = 0; r < n; ++r) {
        kernels_.widen[int(parameter.type)](rows[r], taken, panel_row(r) + filled_ * panel_element());
      }
      column += taken;
      filled_ += taken;
      if (filled_ == chunk_) multiply_panel(next_chunk(parameter, column, taken));
    }
  }

  // What to prefetch of the rows that rows_ points to.
  struct Next {
    int64_t offset;   // in bytes
    int64_t element;  // its size; 0: nothing to prefetch
  };

  // The chunk at `column`, which is `offset` elements on from where rows_ points to. Also beyond the end of the job:
  // mostly, the next one is there.
  Next next_chunk(const Parameter& parameter, int64_t column, int64_t offset) const {
    const int64_t size = element_size(parameter.type);
    return {offset * size, num_rows() > kAbreastRows && column < parameter.size ? size : 0};
  }

  // Multiplies what the panel holds, and empties it.
  void multiply_panel(Next next = {0, 0}) {
    const void** rows = rows_.data() + num_tasks_;
    const int64_t lanes = kernels_.lanes;
    const int64_t padded = (filled_ + lanes - 1) / lanes * lanes;
    for (int r = 0; r < num_rows(); ++r) {
      rows[r] = panel_row(r);
      std::fill_n(panel_row(r) + filled_ * panel_element(), (padded - filled_) * panel_element(), char{0});
    }
    multiply(tiles(panel_type()), rows, padded, next);
    filled_ = 0;
  }

  // Adds the products of n columns of `rows` to sums_; each tile prefetches its share of what comes next.
  void multiply(const TileSet& set, const void* const* rows, int64_t n, Next next) {
    const int num = num_rows(), block = set.block;
    const int64_t blocks = (num + block - 1) / block, tiles = blocks * (blocks + 1) / 2;
    int64_t tile = 0, fetched = 0;
    auto look_ahead = [&](int i) {
      const auto* here = static_cast<const char*>(rows[i]);  // in the cache: where there is no more to prefetch
      Ahead ahead = {{here, here}, next.element};
      if (next.element == 0) return ahead;
      const int64_t share = num * ++tile / tiles;
      for (const char*& place : ahead.place) {
        if (fetched < share) place = static_cast<const char*>(rows_[fetched++]) + next.offset;
      }
      return ahead;
    };
    double* sums = sums_.get();
    for (int i = 0; i < num; i += block) {
      const int height = std::min(block, num - i);
      for (int j = 0; j < i; j += block, sums += set.sums) {
        set.tile[height - 1](rows + i, rows + j, n, look_ahead(i), sums);
      }
      set.triangle[height - 1](rows + i, n, look_ahead(i), sums);
      sums += set.sums;
    }
  }

  // Adds sums_ to the tasks' places in out_.
  void scatter() {
    const TileSet& set = tiles(panel_type());
    const double* sums = sums_.get();
    for (int i = 0; i < num_rows(); i += set.block) {
      const int stop = std::min(i + set.block, num_rows());
      for (int j = 0; j <= i; j += set.block, sums += set.sums) {
        const double* sum = sums;
        for (int a = i; a < stop; ++a) {
          for (int b = j; b < (i == j ? a + 1 : j + set.block); ++b) out_[tasks_[a] * num_tasks_ + tasks_[b]] += *sum++;
        }
      }
    }
  }

  const GramKernels& kernels_;
  const int64_t num_tasks_;
  CacheAligned<double> sums_;      // the tiles one after the other
  CacheAligned<char> panel_;       // a row of one chunk for every task
  std::vector<const void*> rows_;  // scratch: pointers to the rows, and to the panel's rows
  std::vector<int> present_;       // scratch: the tasks that reach a parameter

  // The sums under way: of which tasks, in which type, for whom, and the columns that wait in the panel.
  std::vector<int> tasks_;
  bool is_double_ = false;
  double* out_ = nullptr;
  int64_t chunk_ = 0;
  int64_t filled_ = 0;
};

// Parameter indices, ordered by group.
std::vector<int64_t> order_by_group(const Rows& rows) {
  std::vector<int64_t> order(rows.num_params);
  for (int64_t p = 0; p < rows.num_params; ++p) order[p] = p;
  auto less = [&](int64_t a, int64_t b) {
    const int32_t group_a = rows.params[a].group, group_b = rows.params[b].group;
    return group_a != group_b ? group_a < group_b : a < b;
  };
  if (!std::is_sorted(order.begin(), order.end(), less)) std::sort(order.begin(), order.end(), less);
  return order;
}

// One job where threads would cost more than they bring. Else about a million elements each (fewer if T is large and
// they cost more), but 8 or more, if that leaves 8,192 columns, and so few that their partial sums stay small beside
// the rows.
int64_t count_jobs(const Rows& rows) {
  int64_t columns = 0;
  for (int64_t p = 0; p < rows.num_params; ++p) columns += rows.params[p].size;
  const int64_t tasks = rows.num_tasks;
  const int64_t work = columns * tasks * std::max<int64_t>(tasks / 16, 1);
  if (work < kParallelWork) return 1;
  const int64_t matrices = std::min<int64_t>(16, (int64_t{4} << 20) / (tasks * tasks));
  const int64_t affordable = std::max({columns / (128 * tasks), matrices, int64_t{1}});
  return std::min({std::max<int64_t>(work >> 20, 8), std::max(columns >> 13, int64_t{4}), affordable, int64_t{256}});
}

}  // namespace

void gram_cpu(const Rows& rows, double* gramian) {
  const int64_t tasks = rows.num_tasks, matrix = tasks * tasks;
  std::fill_n(gramian, rows.num_groups * matrix, 0.0);
  if (tasks == 0 || rows.num_params == 0) return;

  const std::vector<int64_t> order = order_by_group(rows);
  const int64_t jobs = count_jobs(rows);
  const std::vector<Cut> cuts = partition(rows, order, jobs);
  auto group_at = [&](int64_t index) { return rows.params[order[index]].group; };

  // A job that begins inside a group adds that group's columns to a matrix of its own.
  std::vector<double*> partial(jobs, nullptr);
  std::unique_ptr<double[]> partials(jobs > 1 ? new double[(jobs - 1) * matrix] : nullptr);
  for (int64_t j = 1; j < jobs; ++j) {
    const Cut cut = cuts[j];
    const bool inside = cut.column > 0 || (cut.index > 0 && group_at(cut.index) == group_at(cut.index - 1));
    if (inside) partial[j] = &partials[(j - 1) * matrix];
  }

  const int64_t num_workers = std::min<int64_t>(jobs, num_threads());
  std::vector<RangeGramian> workers;
  workers.reserve(num_workers);
  for (int64_t w = 0; w < num_workers; ++w) workers.emplace_back(gram_kernels(), rows.num_tasks);

  run_jobs(num_workers, jobs, [&](int64_t worker, int64_t j) {
    const Cut begin = cuts[j], end = cuts[j + 1];
    if (partial[j] != nullptr) std::fill_n(partial[j], matrix, 0.0);
    for (int64_t i = begin.index; i <= end.index && i < rows.num_params; ++i) {
      const Parameter& parameter = rows.params[order[i]];
      const bool continues = partial[j] != nullptr && parameter.group == group_at(begin.index);
      workers[worker].add(parameter, i == begin.index ? begin.column : 0, i == end.index ? end.column : parameter.size,
                          continues ? partial[j] : gramian + parameter.group * matrix);
    }
    workers[worker].finish();
  });

  for (int64_t j = 1; j < jobs; ++j) {
    if (partial[j] == nullptr) continue;
    double* sum = gramian + group_at(cuts[j].index) * matrix;
    for (int64_t a = 0; a < tasks; ++a) {
      for (int64_t b = 0; b <= a; ++b) sum[a * tasks + b] += partial[j][a * tasks + b];
    }
  }
  for (double* m = gramian; m < gramian + rows.num_groups * matrix; m += matrix) {
    for (int64_t a = 0; a < tasks; ++a) {
      for (int64_t b = 0; b < a; ++b) m[b * tasks + a] = m[a * tasks + b];
    }
  }
}

}  // namespace fastmtl
