#include "packing.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

namespace fastrnn {

std::vector<at::Tensor> packing_order(const at::Tensor& offsets) {
  TORCH_CHECK(offsets.dim() == 1 && offsets.is_cpu(), "offsets: expected [B + 1] on the CPU, got ", offsets.sizes(),
              " on ", offsets.device());
  const at::Tensor held = offsets.to(at::kLong).contiguous();
  const int64_t* const start = held.const_data_ptr<int64_t>();
  const int64_t B = held.size(0) - 1;
  if (B < 1) return {};
  TORCH_CHECK(start[0] == 0, "offsets: expected the first to be 0, got ", start[0]);
  int64_t T = 0;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t steps = start[b + 1] - start[b];
    TORCH_CHECK(steps >= 0, "offsets: expected them to rise, got ", start[b], " before ", start[b + 1]);
    if (steps == 0) return {};
    T = std::max(T, steps);
  }
  const auto numbers = [](int64_t n) { return at::empty({n}, at::kLong); };
  at::Tensor batch_sizes = numbers(T), order = numbers(B), rank = numbers(B), places = numbers(start[B]),
             sources = numbers(start[B]);
  int64_t* const first = order.mutable_data_ptr<int64_t>();
  int64_t* const ranks = rank.mutable_data_ptr<int64_t>();
  int64_t* const sizes = batch_sizes.mutable_data_ptr<int64_t>();
  int64_t* const place_of = places.mutable_data_ptr<int64_t>();
  int64_t* const source_of = sources.mutable_data_ptr<int64_t>();
  std::iota(first, first + B, 0);
  const auto steps_of = [&](int64_t b) { return start[b + 1] - start[b]; };
  std::stable_sort(first, first + B, [&](int64_t a, int64_t b) { return steps_of(a) > steps_of(b); });
  for (int64_t i = 0; i < B; ++i) ranks[first[i]] = i;
  int64_t place = 0, rows = B;
  for (int64_t t = 0; t < T; ++t) {
    while (steps_of(first[rows - 1]) <= t) --rows;
    sizes[t] = rows;
    for (int64_t i = 0; i < rows; ++i, ++place) {
      const int64_t source = start[first[i]] + t;
      source_of[place] = source;
      place_of[source] = place;
    }
  }
  return {batch_sizes, order, rank, places, sources};
}

}  // namespace fastrnn
