// What csrc/torch/tf32_product.h asks of cuBLAS, of matrices of every layout. Prints how many products it made.
#include "../../../csrc/torch/tf32_product.h"

#include <ATen/ops/add.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>

#include <cstdio>
#include <vector>

namespace {

// [P, rows, columns] by rows, by columns, as a part of a larger one, one for all groups, and with neither side whole.
std::vector<at::Tensor> layouts(int64_t P, int64_t rows, int64_t columns) {
  return {
      at::randn({P, rows, columns}),
      at::randn({P, columns, rows}).transpose(1, 2),
      at::randn({rows, P, columns}).transpose(0, 1),
      at::randn({columns, P, rows}).permute({1, 2, 0}),
      at::randn({P, rows + 2, columns + 3}).narrow(1, 1, rows).narrow(2, 2, columns),
      at::randn({1, rows, columns}).expand({P, rows, columns}),
      at::randn({P, rows, 1}).expand({P, rows, columns}),
      at::randn({P, rows, 2 * columns}).slice(2, 0, 2 * columns, 2),
  };
}

}  // namespace

int main() {
  int count = 0;
  for (const int64_t P : {1, 3})
    for (const int64_t m : {1, 4})
      for (const int64_t n : {1, 5})
        for (const int64_t k : {1, 2, 7})
          for (const at::Tensor& a : layouts(P, m, k))
            for (const at::Tensor& b : layouts(P, k, n)) {
              at::Tensor out = at::empty({P, m, n});
              bool right = fastrnn::tf32_product(out, a, b) && at::allclose(out, at::bmm(a, b), 1e-5, 1e-5);
              out.fill_(2);
              const at::Tensor sum = at::add(out, at::bmm(a, b));
              right = right && fastrnn::tf32_product(out, a, b, /*add=*/true) && at::allclose(out, sum, 1e-5, 1e-5);
              // Rows apart, as gates are in the memory of what is saved; nothing between them is touched.
              at::Tensor wide = at::full({P, m, n + 3}, 7.0), part = wide.narrow(2, 1, n);
              right = right && fastrnn::tf32_product(part, a, b) && at::allclose(part, at::bmm(a, b), 1e-5, 1e-5) &&
                      wide.eq(7).sum().item<int64_t>() >= 3 * P * m && wide.select(2, 0).eq(7).all().item<bool>();
              if (!right) {
                std::printf("wrong: P %d m %d n %d k %d\n", int(P), int(m), int(n), int(k));
                return 1;
              }
              ++count;
            }
  at::Tensor out = at::empty({1, 2, 2});
  const at::Tensor x = at::randn({1, 2, 2});
  at::Tensor turned = at::empty({1, 2, 2}).transpose(1, 2);
  const bool refused = !fastrnn::tf32_product(out, x, x.to(at::kDouble)) && !fastrnn::tf32_product(turned, x, x) &&
                       !fastrnn::tf32_product(out, at::empty({1, 2, 0}), at::empty({1, 0, 2}));
  std::printf("%d products\n", count);
  return refused ? 0 : 1;
}
