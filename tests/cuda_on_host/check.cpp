#include "check.h"

namespace check {

int num_cases, num_failures;
bool quick;

namespace {

void count_failure() {
  ++num_failures;
  if (quick) exit(1);
}

}  // namespace

void within(const std::string& what, double error, double tolerance) {
  if (error <= tolerance) return;
  printf("FAILED %s: error %.3e > %.1e\n", what.c_str(), error, tolerance);
  count_failure();
}

void succeeded(const std::string& what, int cuda_error) {
  if (cuda_error == 0) return;
  printf("FAILED %s: CUDA error %d\n", what.c_str(), cuda_error);
  count_failure();
}

std::string Case::name() const {
  const char* kLayouts[] = {"aligned", "misaligned", "stacked"};
  const char* kTypes[] = {"f32", "f64", "bf16", "f16"};
  std::string text = "T=" + std::to_string(num_tasks) + " " + kLayouts[int(layout)] + (missing ? " missing" : "") +
                     " groups=" + std::to_string(num_groups) + " types=";
  for (Scalar type : types) text += std::string(kTypes[int(type)]) + ",";
  text += " " + std::to_string(sizes.size()) + " sizes=";
  for (size_t p = 0; p < sizes.size() && p < 4; ++p) text += std::to_string(sizes[p]) + ",";
  return text;
}

bool Case::skipped() const { return quick && types != std::vector{Scalar::f32}; }

double load(const void* row, Scalar type, int64_t i) {
  switch (type) {
    case Scalar::f32:
      return static_cast<const float*>(row)[i];
    case Scalar::f64:
      return static_cast<const double*>(row)[i];
    case Scalar::bf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(row)[i]);
    default:
      return __half2float(static_cast<const __half*>(row)[i]);
  }
}

void store(void* row, Scalar type, int64_t i, double value) {
  switch (type) {
    case Scalar::f32:
      static_cast<float*>(row)[i] = static_cast<float>(value);
      break;
    case Scalar::f64:
      static_cast<double*>(row)[i] = value;
      break;
    case Scalar::bf16:
      static_cast<__nv_bfloat16*>(row)[i] = __float2bfloat16_rn(static_cast<float>(value));
      break;
    default:
      static_cast<__half*>(row)[i] = __float2half_rn(static_cast<float>(value));
  }
}

RandomRows::RandomRows(const Case& c) {
  std::mt19937 random(c.num_tasks);
  std::normal_distribution<float> normal;
  const int64_t num_params = c.sizes.size();
  for (int64_t p = 0; p < num_params; ++p) {
    const Scalar type = c.types[p % c.types.size()];
    const int64_t width = fastmtl::element_size(type), bytes = c.sizes[p] * width;
    const int64_t shift = c.layout == Layout::misaligned && p % 2 == 0 ? width : 0;
    char* stack = nullptr;
    if (c.layout == Layout::stacked) {
      memory.emplace_back(c.num_tasks * bytes);
      stack = memory.back().get();
    }
    for (int t = 0; t < c.num_tasks; ++t) {
      if (c.missing && (t + p) % 3 == 1) {
        pointers.push_back(nullptr);
        continue;
      }
      if (!stack) memory.emplace_back(bytes + shift);
      char* row = stack ? stack + t * bytes : memory.back().get() + shift;
      for (int64_t i = 0; i < c.sizes[p]; ++i) {
        store(row, type, i, c.constant != 0 ? c.constant : normal(random) + 0.25f * (i % 3));
      }
      pointers.push_back(row);
    }
  }
  for (int64_t p = 0; p < num_params; ++p) {
    const int32_t group = (p * 5 + 1) % c.num_groups;  // not in order
    params.push_back({&pointers[p * c.num_tasks], c.sizes[p], c.types[p % c.types.size()], group});
  }
  rows = {c.num_tasks, c.num_groups, num_params, params.data()};
}

}  // namespace check
