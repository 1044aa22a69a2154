// From a list of torch tensors to Rows: read by hand through the C shim (no per-tensor allocation), validated once for
// every backend. A tensor that a kernel cannot read as it lies (elements not dense, or strides unlike its siblings') is
// copied first, into an owned tensor.
//
// Errors are std::invalid_argument, which arrives in Python as ValueError.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <deque>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "rows.h"

namespace fastmtl {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

// What a kernel needs to know of a tensor; sizes and strides point into the tensor itself.
struct TensorView {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim, numel;
  int32_t dtype, device_type, device_index;

  explicit TensorView(AtenTensorHandle h) {
    int32_t layout;
    aoti_torch_get_layout(h, &layout);
    if (layout != aoti_torch_layout_strided())
      throw std::invalid_argument("expected dense (strided) gradients, found a sparse one");
    int64_t *size, *stride;
    aoti_torch_get_data_ptr(h, &data);
    aoti_torch_get_sizes(h, &size);
    aoti_torch_get_strides(h, &stride);
    aoti_torch_get_dim(h, &dim);
    aoti_torch_get_numel(h, &numel);
    aoti_torch_get_dtype(h, &dtype);
    aoti_torch_get_device_type(h, &device_type);
    aoti_torch_get_device_index(h, &device_index);
    sizes = size;
    strides = stride;
  }
  // The tensor without its first dimension: the shape of one row of a stacked tensor.
  TensorView row() const {
    TensorView v = *this;
    ++v.sizes;
    ++v.strides;
    --v.dim;
    v.numel = 1;
    for (int64_t d = 0; d < v.dim; ++d) v.numel *= v.sizes[d];
    return v;
  }
};

inline std::optional<Scalar> scalar_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Scalar::f32;
  if (dtype == aoti_torch_dtype_float64()) return Scalar::f64;
  if (dtype == aoti_torch_dtype_bfloat16()) return Scalar::bf16;
  if (dtype == aoti_torch_dtype_float16()) return Scalar::f16;
  return std::nullopt;
}

inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::string s = "[";
  for (int64_t d = 0; d < dim; ++d) s += (d ? ", " : "") + std::to_string(sizes[d]);
  return s + "]";
}
inline std::string shape_text(const Tensor& t) { return shape_text(TensorView(t.get()).sizes, t.dim()); }

inline bool same_sizes(const TensorView& a, const TensorView& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}
inline bool same_strides(const TensorView& a, const TensorView& b) {
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.strides[d] != b.strides[d] && a.sizes[d] != 1) return false;
  return true;
}
// Whether the elements fill a block of memory without gap or overlap, in any order of the dimensions.
inline bool is_dense(const TensorView& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim - 1; d >= 0; --d) {  // the usual case: row-major
    if (t.sizes[d] == 1) continue;
    if (t.strides[d] != expected) break;
    expected *= t.sizes[d];
  }
  if (expected == t.numel || t.numel == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (int64_t d = 0; d < t.dim; ++d)
    if (t.sizes[d] != 1) by_stride.emplace_back(t.strides[d], t.sizes[d]);
  std::sort(by_stride.begin(), by_stride.end());
  expected = 1;
  for (auto [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// torch.empty_like(like, dtype=type), which torch::stable::empty_like cannot do.
inline Tensor empty_like(const Tensor& like, ScalarType type) {
  using torch::stable::detail::from;
  const StableIValue none = from(std::nullopt);
  std::array<StableIValue, 6> stack{from(like), from(std::optional<ScalarType>(type)), none, none, none, none};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline void check_tensor(const Tensor& t, ScalarType type, const std::vector<int64_t>& sizes, Device device,
                         const char* name) {
  TensorView v(t.get());
  if (t.scalar_type() != type) throw std::invalid_argument(std::string(name) + ": wrong dtype");
  if (v.dim != static_cast<int64_t>(sizes.size()) || !std::equal(sizes.begin(), sizes.end(), v.sizes))
    throw std::invalid_argument(std::string(name) + ": expected shape " +
                                shape_text(sizes.data(), static_cast<int64_t>(sizes.size())) + ", found " +
                                shape_text(v.sizes, v.dim));
  if (t.device() != device) throw std::invalid_argument(std::string(name) + ": on another device than the rest");
  if (!t.is_contiguous()) throw std::invalid_argument(std::string(name) + ": must be contiguous");
}
inline void check_double(const Tensor& t, const std::vector<int64_t>& sizes, Device device, const char* name) {
  if (t.scalar_type() != ScalarType::Double) throw std::invalid_argument(std::string(name) + ": expected float64");
  check_tensor(t, ScalarType::Double, sizes, device, name);
}
inline int64_t num_groups_of(const Tensor& weights) {
  if (weights.dim() != 2) throw std::invalid_argument("weights: expected shape [K, T], found " + shape_text(weights));
  return weights.size(0);
}

// A Tensor?[] argument. Owns the list and what was taken out of it.
class TensorList {
 public:
  explicit TensorList(StableIValue value) : list_(torch::stable::detail::to<StableListHandle>(value)) {
    torch_list_size(list_, &size_);
    handles_.reserve(size_);
    for (size_t i = 0; i < size_; ++i) {
      StableIValue item;
      torch_list_get_item(list_, i, &item);
      auto* optional = torch::stable::detail::to<StableIValue*>(item);
      handles_.push_back(optional ? torch::stable::detail::to<AtenTensorHandle>(*optional) : nullptr);
      delete optional;
    }
  }
  ~TensorList() {
    for (auto h : handles_)
      if (h) aoti_torch_delete_tensor_object(h);
    torch_delete_list(list_);
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  int64_t size() const { return static_cast<int64_t>(size_); }
  AtenTensorHandle operator[](int64_t i) const { return handles_[static_cast<size_t>(i)]; }  // null: None

 private:
  StableListHandle list_;
  size_t size_;
  std::vector<AtenTensorHandle> handles_;
};

// Rows over a TensorList: either one stacked tensor [T, *shape] per parameter, or, parameter by parameter, T tensors or
// None. `outputs`, if given, are the dense tensors that combine_ adds to: they fix shape and strides of each parameter.
class TensorRows {
 public:
  using OptionalInts = std::optional<std::vector<int64_t>>;

  TensorRows(const char* op, const TensorList& list, int64_t num_tasks, bool stacked, const OptionalInts& groups,
             int64_t num_groups, const std::vector<Tensor>* outputs = nullptr)
      : op_(op), num_tasks_(num_tasks) {
    if (num_tasks < 1) fail("expected at least one task, found num_tasks = " + std::to_string(num_tasks));
    int64_t per_param = stacked ? 1 : num_tasks, n = list.size() / per_param;
    if (list.size() % per_param != 0)
      fail("expected a multiple of " + std::to_string(num_tasks) + " gradients, found " + std::to_string(list.size()));
    if (groups && static_cast<int64_t>(groups->size()) != n)
      fail("expected one group per parameter (" + std::to_string(n) + "), found " + std::to_string(groups->size()));
    if (outputs && static_cast<int64_t>(outputs->size()) != n)
      fail("expected one output per parameter (" + std::to_string(n) + "), found " + std::to_string(outputs->size()));
    pointers_.resize(static_cast<size_t>(n * num_tasks));
    params_.reserve(static_cast<size_t>(n));
    references_.reserve(static_cast<size_t>(n));
    for (int64_t p = 0; p < n; ++p) {
      int64_t group = groups ? (*groups)[static_cast<size_t>(p)] : 0;
      if (group < 0 || group >= num_groups)
        fail("parameter " + std::to_string(p) + ": group " + std::to_string(group) + " is not in 0.." +
             std::to_string(num_groups - 1));
      AtenTensorHandle output = outputs ? (*outputs)[static_cast<size_t>(p)].get() : nullptr;
      if (stacked)
        add_stacked(p, list[p], output, group);
      else
        add_separate(p, list, output, group);
    }
    rows_ = {static_cast<int32_t>(num_tasks), static_cast<int32_t>(num_groups), n, params_.data()};
  }
  TensorRows(const TensorRows&) = delete;
  TensorRows& operator=(const TensorRows&) = delete;

  const Rows& rows() const { return rows_; }
  bool is_cuda() const { return device_type_ == aoti_torch_device_type_cuda(); }
  Device device() const {
    if (is_cuda()) return Device(DeviceType::CUDA, static_cast<torch::stable::DeviceIndex>(device_index_));
    return Device(DeviceType::CPU);
  }
  // One uninitialized tensor per parameter, shaped and strided like its rows; `widen`: float32 where they have 16 bits.
  std::vector<Tensor> new_outputs(bool widen) const {
    std::vector<Tensor> out;
    for (size_t p = 0; p < references_.size(); ++p) {
      if (!references_[p]) fail("parameter " + std::to_string(p) + ": no task has a gradient for it");
      Tensor like = borrow(references_[p]);
      const ScalarType type = widen && element_size(params_[p].type) == 2 ? ScalarType::Float : like.scalar_type();
      out.push_back(empty_like(is_stacked_ ? torch::stable::select(like, 0, 0) : like, type));
    }
    return out;
  }

 private:
  [[noreturn]] void fail(const std::string& text) const {
    throw std::invalid_argument("fastmtl::" + op_ + ": " + text);
  }
  static Tensor borrow(AtenTensorHandle h) {
    AtenTensorHandle copy;
    aoti_torch_new_tensor_handle(h, &copy);
    return Tensor(copy);
  }
  AtenTensorHandle keep(Tensor t) {
    owned_.push_back(std::move(t));
    return owned_.back().get();
  }
  Scalar scalar(const TensorView& v, int64_t p) const {
    if (auto s = scalar_of(v.dtype)) return *s;
    fail("parameter " + std::to_string(p) + ": expected float32, float64, bfloat16 or float16 gradients");
  }
  static std::string device_text(int32_t type, int32_t index) {
    if (type == aoti_torch_device_type_cpu()) return "cpu";
    return (type == aoti_torch_device_type_cuda() ? "cuda:" : "another device:") + std::to_string(index);
  }
  // `what`: the task, or the output.
  void check_device(const TensorView& v, int64_t p, const std::string& what) {
    if (device_type_ < 0) {
      device_type_ = v.device_type;
      device_index_ = v.device_index;
    } else if (v.device_type != device_type_ || v.device_index != device_index_) {
      fail("parameter " + std::to_string(p) + ", " + what + ": on " + device_text(v.device_type, v.device_index) +
           ", the others on " + device_text(device_type_, device_index_) + "; all must be on one device");
    }
  }

  void add_stacked(int64_t p, AtenTensorHandle h, AtenTensorHandle output, int64_t group) {
    is_stacked_ = true;
    if (!h) fail("parameter " + std::to_string(p) + ": expected a stacked gradient [T, ...], found None");
    TensorView v(h);
    if (v.dim < 1 || v.sizes[0] != num_tasks_)
      fail("parameter " + std::to_string(p) + ": expected a stacked gradient of shape [" + std::to_string(num_tasks_) +
           ", ...], found " + shape_text(v.sizes, v.dim));
    check_device(v, p, "stacked");
    TensorView row = v.row();
    if (output) {
      check_device(TensorView(output), p, "output");
      check_like(row, expected_by(output, row, p, 0), p, 0);
    }
    bool fits = is_dense(row) && (!output || same_strides(row, TensorView(output)));
    if (!fits && output && !is_row_major(TensorView(output)))
      fail("parameter " + std::to_string(p) + ": pass separate rows where the output is not row-major");
    if (!fits) {
      h = keep(torch::stable::contiguous(borrow(h)));
      v = TensorView(h);
      row = v.row();
    }
    Scalar type = scalar(v, p);
    const void** to = pointers_.data() + p * num_tasks_;
    for (int64_t t = 0; t < num_tasks_; ++t)
      to[t] = static_cast<const char*>(v.data) + t * v.strides[0] * element_size(type);
    references_.push_back(h);
    params_.push_back({to, row.numel, type, static_cast<int32_t>(group)});
  }

  void add_separate(int64_t p, const TensorList& list, AtenTensorHandle output, int64_t group) {
    const void** to = pointers_.data() + p * num_tasks_;
    AtenTensorHandle reference = output;  // the tensor whose shape and strides the rows must have
    std::optional<TensorView> expected;
    bool first = true;
    if (output) expected.emplace(output);
    for (int64_t t = 0; t < num_tasks_; ++t) {
      AtenTensorHandle h = list[p * num_tasks_ + t];
      if (!h) {
        to[t] = nullptr;
        continue;
      }
      TensorView v(h);
      if (v.device_type != device_type_ || v.device_index != device_index_) {
        check_device(v, p, "task " + std::to_string(t));
      }
      if (!expected) {
        if (!is_dense(v)) {
          h = keep(torch::stable::contiguous(borrow(h)));
          v = TensorView(h);
        }
        reference = h;
        expected = v;
      } else {
        if (first && output) expected = expected_by(output, v, p, t);
        check_like(v, *expected, p, t);
        if (!same_strides(v, *expected)) {
          Tensor row = borrow(h);
          h = keep(empty_like(borrow(reference), row.scalar_type()));
          torch::stable::copy_(owned_.back(), row);
          v = TensorView(h);
        }
      }
      first = false;
      to[t] = v.data;
    }
    references_.push_back(reference);
    if (!expected) {
      params_.push_back({to, 0, Scalar::f32, static_cast<int32_t>(group)});
      return;
    }
    check_device(*expected, p, "output");
    params_.push_back({to, expected->numel, scalar(*expected, p), static_cast<int32_t>(group)});
  }

  // What rows like this one must be like to be added to an output: of its type, or of 16 bits where it is float32.
  TensorView expected_by(AtenTensorHandle output, const TensorView& row, int64_t p, int64_t t) const {
    TensorView v(output);
    if (v.dtype != row.dtype && (v.dtype != aoti_torch_dtype_float32() || element_size(scalar(row, p)) != 2))
      fail("parameter " + std::to_string(p) + ", task " + std::to_string(t) +
           ": gradient of another dtype than the output; only bfloat16 and float16 are added to float32");
    v.dtype = row.dtype;
    return v;
  }
  void check_like(const TensorView& v, const TensorView& r, int64_t p, int64_t t) const {
    auto where = [&] { return "parameter " + std::to_string(p) + ", task " + std::to_string(t) + ": "; };
    if (!same_sizes(v, r))
      fail(where() + "gradient of shape " + shape_text(v.sizes, v.dim) + ", expected " + shape_text(r.sizes, r.dim));
    if (v.dtype != r.dtype) fail(where() + "gradient of another dtype than the parameter's other gradients");
  }
  static bool is_row_major(const TensorView& v) {
    int64_t expected = 1;
    for (int64_t d = v.dim - 1; d >= 0; --d) {
      if (v.sizes[d] != 1 && v.strides[d] != expected) return false;
      expected *= v.sizes[d];
    }
    return true;
  }

  std::string op_;
  int64_t num_tasks_;
  bool is_stacked_ = false;
  int32_t device_type_ = -1, device_index_ = -1;
  std::vector<const void*> pointers_;
  std::vector<Parameter> params_;
  std::vector<AtenTensorHandle> references_;  // per parameter a tensor of its rows' layout (null: no rows)
  std::deque<Tensor> owned_;
  Rows rows_{};
};

// The tensors that combine_ accumulates into. One that is not dense is accumulated in a dense copy and written back.
class OutputTensors {
 public:
  explicit OutputTensors(const std::vector<Tensor>& tensors) : targets_(tensors), dense_(tensors) {
    for (Tensor& t : dense_) {
      if (is_dense(TensorView(t.get()))) continue;
      Tensor copy = torch::stable::contiguous(t);
      t = copy;
    }
  }
  const std::vector<Tensor>& dense() const { return dense_; }
  void write_back() {
    for (size_t i = 0; i < targets_.size(); ++i)
      if (targets_[i].get() != dense_[i].get()) torch::stable::copy_(targets_[i], dense_[i]);
  }

 private:
  std::vector<Tensor> targets_, dense_;
};

}  // namespace fastmtl
