// The product of a few rows with a panel by the processor's matrix unit: AMX, of bfloat16 with sums in float32.
//
// It has eight registers of 16 rows of 64 bytes. One of rows of `a` holds 32 factors a row; one of a panel holds the same
// 32 of 16 outputs, two neighbours along the sum side by side, which is how panels of pairs are packed anyway; and one of
// sums 16 outputs a row. Intel, "Architecture Instruction Set Extensions Programming Reference" (319433), chapter 3.
#pragma once
#include "isa-inl.h"

#include "scalar.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Rows and depth of a register.
constexpr int kMatrixRows = 16, kMatrixDepth = 32;
// Registers 0 to 3 are for sums, 4 and 5 for the factors of two blocks of rows, 6 and 7 for those of a panel.
constexpr int kMatrixSums = 4, kOfRows = 4, kOfPanel = 6;

#if defined(FASTRNN_SOFTWARE_MATRIX)
// The same in C++, for tests on machines and under sanitizers that do not know the unit.
struct SoftwareMatrixUnit {
  int rows;
  float sums[kMatrixSums][kMatrixRows][16];
  BFloat16 factors[8][kMatrixRows][kMatrixDepth];
};
inline thread_local SoftwareMatrixUnit software_matrix_unit;

inline void matrix_begin(int rows) {
  if (rows == software_matrix_unit.rows) return;
  __builtin_memset(&software_matrix_unit, 0xff, sizeof software_matrix_unit);
  software_matrix_unit.rows = rows;
}
inline void matrix_end() { software_matrix_unit.rows = 0; }
template <int kRegister>
void matrix_zero() {
  __builtin_memset(software_matrix_unit.sums[kRegister], 0, sizeof software_matrix_unit.sums[kRegister]);
}
template <int kRegister>
void matrix_load(const BFloat16* from, int64_t stride) {
  const int rows = kRegister >= kOfPanel ? kMatrixRows : software_matrix_unit.rows;
  for (int i = 0; i < rows; ++i) __builtin_memcpy(software_matrix_unit.factors[kRegister][i], from + i * stride, 64);
}
template <int kRegister>
void matrix_repeat(const float* row) {
  for (auto& sums : software_matrix_unit.sums[kRegister]) __builtin_memcpy(sums, row, 64);
}
template <int kSums, int kRows, int kPanel>
void matrix_multiply() {
  SoftwareMatrixUnit& unit = software_matrix_unit;
  const auto widened = [](BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); };
  for (int i = 0; i < unit.rows; ++i)
    for (int k = 0; k < kMatrixDepth; ++k)
      for (int j = 0; j < 16; ++j)
        unit.sums[kSums][i][j] +=
            widened(unit.factors[kRows][i][k]) * widened(unit.factors[kPanel][k / 2][2 * j + k % 2]);
}
template <int kRegister>
void matrix_store(float* to, int64_t stride) {
  for (int i = 0; i < software_matrix_unit.rows; ++i)
    __builtin_memcpy(to + i * stride, software_matrix_unit.sums[kRegister][i], 64);
}
#else
// In assembly, since GNU's functions of AMX take a register's number as text, and do not say that they read memory.
struct alignas(64) MatrixShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};

// Sets the shapes of the registers: those of a panel have kMatrixRows rows, the others `rows`. To read the shapes and compare
// them takes 7 ns, to set them 80, so they are set where they differ.
inline void matrix_begin(int rows) {
  MatrixShapes shapes, present;
  for (int i = 0; i < 8; ++i) {
    shapes.bytes[i] = 64;
    shapes.rows[i] = uint8_t(i >= kOfPanel ? kMatrixRows : rows);
  }
  asm volatile("sttilecfg %0" : "=m"(present));
  if (__builtin_memcmp(&present, &shapes, sizeof shapes) != 0) asm volatile("ldtilecfg %0" ::"m"(shapes));
}
inline void matrix_end() { asm volatile("tilerelease" ::: "memory"); }
template <int kRegister>
FASTRNN_HD void matrix_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}
// stride: elements from row to row.
template <int kRegister>
FASTRNN_HD void matrix_load(const BFloat16* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * int64_t(sizeof *from)), "i"(kRegister)
               : "memory");
}
// One row of sums in all rows.
template <int kRegister>
FASTRNN_HD void matrix_repeat(const float* row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(row), "r"(int64_t(0)), "i"(kRegister) : "memory");
}
template <int kSums, int kRows, int kPanel>
FASTRNN_HD void matrix_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kPanel));
}
template <int kRegister>
FASTRNN_HD void matrix_store(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * int64_t(sizeof *to)), "i"(kRegister) : "memory");
}
#endif

// sums[m * stride + 16 n ..], which begin at bias[16 n ..] or 0 (of factors of bfloat16, beside whose rounding what a large
// first term takes from float32's is nothing), for kColumns vectors n and kBlocks blocks of rows m as
// matrix_begin was told, the second of which begins at row `second`. `depth` is a multiple of kMatrixDepth.
//
// No register is loaded again soon after its use: a core that runs two threads has none to rename it to.
template <int kBlocks, int kColumns>
FASTRNN_ONE_COPY void matrix_product(const BFloat16* a, int64_t a_stride, int64_t second, const BFloat16* panel,
                                     int64_t panel_stride, int64_t depth, const float* bias, float* sums,
                                     int64_t stride) {
  static_assert(kBlocks * kColumns <= kMatrixSums && kBlocks <= 2);
  const auto each = []<int... i>(std::integer_sequence<int, i...>, auto body) FASTRNN_INLINE_BODY {
    (body(std::integral_constant<int, i>()), ...);
  };
  constexpr std::make_integer_sequence<int, kColumns> columns;
  each(std::make_integer_sequence<int, kBlocks * kColumns>(), [&](auto i) FASTRNN_INLINE_BODY {
    if (bias) matrix_repeat<i>(bias + i % kColumns * 16);
    else matrix_zero<i>();
  });
  for (int64_t k = 0; k < depth; k += kMatrixDepth, panel += kMatrixDepth * panel_stride) {
    matrix_load<kOfRows>(a + k, a_stride);
    if constexpr (kBlocks == 2) matrix_load<kOfRows + 1>(a + second * a_stride + k, a_stride);
    each(columns, [&](auto n) FASTRNN_INLINE_BODY {
      constexpr int of_panel = kOfPanel + n % 2;
      matrix_load<of_panel>(panel + n * 32, 2 * panel_stride);
      matrix_multiply<n, kOfRows, of_panel>();
      if constexpr (kBlocks == 2) matrix_multiply<kColumns + n, kOfRows + 1, of_panel>();
    });
  }
  each(columns, [&](auto n) FASTRNN_INLINE_BODY {
    matrix_store<n>(sums + n * 16, stride);
    if constexpr (kBlocks == 2) matrix_store<kColumns + n>(sums + second * stride + n * 16, stride);
  });
}

// The same for 1..2 kMatrixRows rows and 1..4 vectors.
inline void matrix_product(const BFloat16* a, int64_t a_stride, int rows, const BFloat16* panel, int64_t panel_stride,
                           int64_t depth, const float* bias, float* sums, int vectors) {
  const bool two = rows > kMatrixRows;
  const int64_t second = two ? rows - kMatrixRows : 0;  // rows that both blocks have are made twice
  matrix_begin(two ? kMatrixRows : rows);
  const auto multiply = [&](auto product, int n) {
    product(a, a_stride, second, panel + n * 32, panel_stride, depth, bias ? bias + n * 16 : nullptr, sums + n * 16,
            vectors * 16);
  };
  if (!two)
    multiply(vectors == 1   ? matrix_product<1, 1>
             : vectors == 2 ? matrix_product<1, 2>
             : vectors == 3 ? matrix_product<1, 3>
                            : matrix_product<1, 4>, 0);
  for (int n = 0; two && n < vectors; n += 2) multiply(n + 1 < vectors ? matrix_product<2, 2> : matrix_product<2, 1>, n);
}

// Where this thread may do something else: of one that does not use the registers the system has less to save, and other
// users need not know what shapes they had.
inline void leave_matrix_unit() {
#if defined(FASTRNN_AVX512BF16)
  if (has_matrix_unit()) matrix_end();
#endif
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
