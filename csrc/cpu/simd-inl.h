// The SIMD value type that the CPU recurrence gives to the cells. It is written with the compiler's vector extension,
// so that one text serves every instruction set.
//
// Accuracy, measured by tests/cpp/test_simd.cpp over all finite floats and a dense grid of doubles:
//   exp   <= 2 ulp on [-87.3, 88.3] (double: [-708.3, 709.0]); outside, the value at the end of that range
//   tanh  <= 3 ulp everywhere
//   log1p <= 3 ulp on [0, 1], and there alone
// NaN in gives NaN out. Denormal inputs need no special mode.
#pragma once
#include "isa-inl.h"

#include "../host_device.h"
#include "scalar.h"

namespace fastrnn::cpu::FASTRNN_ISA {

template <class T>
struct Traits;
template <>
struct Traits<float> {
  using Int = int32_t;
  typedef float Native __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef uint16_t Half16 __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));  // as many 16-bit lanes
  typedef uint8_t Bytes __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 4)));
  typedef int32_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7, kLogTerms = 7;
  static constexpr float kLow = -87.3f, kHigh = 88.3f, kTanhHigh = 20.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
};
template <>
struct Traits<double> {
  using Int = int64_t;
  typedef double Native __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef uint16_t Half16 __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 4)));
  typedef uint8_t Bytes __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 8)));
  typedef int32_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13, kLogTerms = 16;
  static constexpr double kLow = -708.3, kHigh = 709.0, kTanhHigh = 40.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0.69314718036912381649, kLn2Low = 1.90821492927058770002e-10;
};

template <class T>
struct Vec {
  static constexpr int kLanes = FASTRNN_VECTOR_BYTES / sizeof(T);
  using Native = typename Traits<T>::Native;
  using Bits = typename Traits<T>::Bits;
  Native v;
  Vec() = default;
  FASTRNN_HD Vec(Native x) : v(x) {}
  // x - 0, since the compiler may not drop x + 0 (it turns -0 into +0).
  FASTRNN_HD explicit Vec(T x) : v(x - Native{}) {}
  FASTRNN_HD explicit Vec(int x) : v(T(x) - Native{}) {}
};

template <class T>
FASTRNN_HD Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return a.v + b.v;
}
template <class T>
FASTRNN_HD Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return a.v - b.v;
}
template <class T>
FASTRNN_HD Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return a.v * b.v;
}
template <class T>
FASTRNN_HD Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return a.v / b.v;
}
template <class T>
FASTRNN_HD Vec<T> operator-(Vec<T> a) {
  return -a.v;
}
template <class T>
FASTRNN_HD Vec<T> where_positive(Vec<T> y, Vec<T> a) {
  return y.v <= T(0) ? typename Vec<T>::Native{} : a.v;
}
template <class T>
FASTRNN_HD Vec<T> where_zero(Vec<T> y, Vec<T> a, Vec<T> b) {
  return y.v == T(0) ? a.v : b.v;
}
template <class T>
FASTRNN_HD Vec<T> maximum(Vec<T> a, Vec<T> b) {
  const typename Vec<T>::Native not_above = a.v <= b.v ? b.v : a.v + b.v;
  return a.v > b.v ? a.v : not_above;
}

// What is to be had of a sum of products x w of dual numbers (dual-inl.h): value and slope, which takes three
// multiply-adds; both where w has no slope, two; the slope alone, two; and it alone where w has none, one. Of other numbers
// there is nothing to choose.
enum class Terms { kAll, kConstantWeights, kSlope, kSlopeOfConstant };

// sum + x w
template <Terms, class T>
FASTRNN_HD Vec<T> add_product(Vec<T> sum, Vec<T> x, Vec<T> w) {
  return sum + x * w;
}

// Lane l of the result: lane index(l) of a, or, from kLanes on, of b. `index` captures nothing, so that it is constant.
template <class T, class Index>
FASTRNN_HD Vec<T> gather_lanes(Vec<T> a, Vec<T> b, Index) {
  return [&]<int... l>(std::integer_sequence<int, l...>) FASTRNN_INLINE_BODY -> Vec<T> {
    return __builtin_shufflevector(a.v, b.v, Index{}(l)...);
  }(std::make_integer_sequence<int, Vec<T>::kLanes>());
}

// Of what is not a plain number, but a dual one (dual-inl.h).
template <class T>
inline constexpr bool kIsDual = false;

// Lane l of vector i becomes lane i of vector l: blocks of s x s lanes change places across the diagonal, for s = 1, 2, 4 ..
template <int s = 1, class T>
  requires(!kIsDual<T>)
FASTRNN_HD void transpose(Vec<T> (&x)[Vec<T>::kLanes]) {
  constexpr int L = Vec<T>::kLanes;
  FASTRNN_UNROLL for (int i = 0; i < L; ++i) {
    if (i & s) continue;
    const Vec<T> upper = x[i], lower = x[i + s];
    x[i] = gather_lanes(upper, lower, [](int l) { return l & s ? L + l - s : l; });
    x[i + s] = gather_lanes(upper, lower, [](int l) { return l & s ? L + l : l + s; });
  }
  if constexpr (2 * s < L) transpose<2 * s>(x);
}

// The sums of the lanes of N = 2^n vectors, at most kLanes. Each vector has parts of `width` lanes, of which each becomes a
// sum. Of two vectors the halves of the parts are added, side by side in one vector; the last vector is halved where it is.
template <int width, class T, int N>
FASTRNN_HD Vec<T> sums_of_parts(const Vec<T> (&x)[N]) {
  constexpr int half = width / 2;
  if constexpr (width == 1) {
    return x[0];
  } else if constexpr (N == 1) {
    return sums_of_parts<half>({x[0] + gather_lanes(x[0], x[0], [](int l) { return l ^ half; })});
  } else {
    Vec<T> y[N / 2];
    FASTRNN_UNROLL for (int m = 0; m < N / 2; ++m) {
      // Beyond kLanes, of the second vector.
      const Vec<T> lower = gather_lanes(x[2 * m], x[2 * m + 1], [](int l) { return l / half * width + l % half; });
      const Vec<T> upper = gather_lanes(x[2 * m], x[2 * m + 1], [](int l) { return l / half * width + l % half + half; });
      y[m] = lower + upper;
    }
    return sums_of_parts<half>(y);
  }
}

// The largest power of two that is above neither.
constexpr int power_of_two(int n, int most) { return n < 2 || most < 2 ? 1 : 2 * power_of_two(n / 2, most / 2); }

// out[k] = the sum of x[k]'s lanes; as many at once as are a power of two.
template <int first = 0, class T, int N>
FASTRNN_HD void sum_lanes(const Vec<T> (&x)[N], T* out) {
  constexpr int L = Vec<T>::kLanes, count = power_of_two(N - first, L);
  Vec<T> some[count];
  FASTRNN_UNROLL for (int k = 0; k < count; ++k) some[k] = x[first + k];
  alignas(64) T sums[L];
  store(sums, sums_of_parts<L>(some));
  FASTRNN_UNROLL for (int k = 0; k < count; ++k) out[first + k] = sums[k * (L / count)];
  if constexpr (first + count < N) sum_lanes<first + count>(x, out);
}

// x, but `most` where it is above that, or `least` where it is below; NaN stays. The instructions for it give the second
// operand where one is NaN, which compilers know of AVX2 and not of AVX-512. (With a mask of all lanes, since GCC warns of the
// lanes that the plain function leaves undefined where there are none.)
template <class T, class Native = typename Vec<T>::Native>
FASTRNN_HD Native at_most(Native x, T most) {
  const Native bound = Native{} + most;
#if FASTRNN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return (Native)_mm512_maskz_min_ps(0xffff, (__m512)bound, (__m512)x);
  else return (Native)_mm512_maskz_min_pd(0xff, (__m512d)bound, (__m512d)x);
#else
  return bound < x ? bound : x;
#endif
}
template <class T, class Native = typename Vec<T>::Native>
FASTRNN_HD Native at_least(Native x, T least) {
  const Native bound = Native{} + least;
#if FASTRNN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return (Native)_mm512_maskz_max_ps(0xffff, (__m512)bound, (__m512)x);
  else return (Native)_mm512_maskz_max_pd(0xff, (__m512d)bound, (__m512d)x);
#else
  return bound > x ? bound : x;
#endif
}
// To [-limit, limit].
template <class T>
FASTRNN_HD Vec<T> clamp(Vec<T> a, T limit) {
  return at_least<T>(at_most<T>(a.v, limit), -limit);
}

// exp(x) = 2^n (1 + m) with integer n and m = e^r - 1, |r| <= ln2 / 2, by r's Taylor series, whose first neglected
// term is below half an ulp of m.
template <class T>
FASTRNN_HD void exp_parts(typename Vec<T>::Native x, typename Vec<T>::Native& scale, typename Vec<T>::Native& m) {
  using Native = typename Vec<T>::Native;
  using Bits = typename Vec<T>::Bits;
  using C = Traits<T>;
  const Native shifted = x * T(1.44269504088896340736) + C::kRound;
  const Native n = shifted - C::kRound;
  const Native r = (x - n * C::kLn2High) - n * C::kLn2Low;
  // Pairs of terms, and by Horner's rule in r^2: half as long a chain of operations that wait for each other as in r.
  static_assert(C::kTerms % 2 == 1);
  const Native square = r * r;
  const auto pair = [&](int k) FASTRNN_INLINE_BODY { return r * inverse_factorial<T>(k + 1) + inverse_factorial<T>(k); };
  Native p = pair(C::kTerms - 1);
#pragma GCC unroll 8
  for (int k = C::kTerms - 3; k >= 2; k -= 2) p = p * square + pair(k);
  m = p * square + r;
  // The integer stands in the low bits of `shifted`; moved up it becomes the exponent.
  scale = (Native)(((Bits)shifted << C::kMantissa) + (typename C::Int(C::kBias) << C::kMantissa));
}

template <class T>
FASTRNN_HD Vec<T> exp(Vec<T> a) {
  using C = Traits<T>;
  typename Vec<T>::Native scale, m;
  exp_parts<T>(at_least<T>(at_most<T>(a.v, C::kHigh), C::kLow), scale, m);
  return scale * m + scale;
}

// tanh |x| = e / (e + 2) with e = exp(2|x|) - 1, which keeps its relative accuracy near 0.
template <class T>
FASTRNN_HD Vec<T> tanh(Vec<T> a) {
  using Native = typename Vec<T>::Native;
  using Bits = typename Vec<T>::Bits;
  using C = Traits<T>;
  const Bits sign = (Bits)a.v & (Bits)(-Native{});
  Native y = (Native)((Bits)a.v ^ sign);
  y = y + y;
  Native scale, m;
  exp_parts<T>(at_most<T>(y, C::kTanhHigh * T(2)), scale, m);
  const Native e = scale * m + (scale - T(1));
  return (Native)((Bits)(e / (e + T(2))) | sign);
}

// log(1 + x) = 2 artanh(s), s = x / (x + 2) in [0, 1/3], by the series s + s^3 / 3 + s^5 / 5 + ..
template <class T>
FASTRNN_HD Vec<T> log1p(Vec<T> a) {
  using Native = typename Vec<T>::Native;
  const Native s = a.v / (a.v + T(2)), square = s * s;
  Native sum = Native{};
#pragma GCC unroll 20
  for (int k = Traits<T>::kLogTerms; k >= 1; --k) sum = (sum + T(1) / T(2 * k + 1)) * square;
  return T(2) * (s * sum + s);
}

// ---- memory: n of the lanes at p; the rest read as 0 and are not written ----

template <class S>
struct Compute {
  using type = S;
};
template <>
struct Compute<BFloat16> {
  using type = float;
};
template <>
struct Compute<Half> {
  using type = float;
};

using Half16 = Traits<float>::Half16;

FASTRNN_HD Vec<float> from_storage(Vec<float>::Native x, const float*) { return x; }
FASTRNN_HD Vec<double> from_storage(Vec<double>::Native x, const double*) { return x; }
FASTRNN_HD Vec<float> from_storage(Half16 x, const BFloat16*) {
  return (Vec<float>::Native)(__builtin_convertvector(x, Vec<float>::Bits) << 16);
}
FASTRNN_HD Vec<float> from_storage(Half16 x, const Half*) {
#if FASTRNN_VECTOR_BYTES == 64
  return (Vec<float>::Native)_mm512_maskz_cvtph_ps(0xffff, (__m256i)x);
#elif FASTRNN_VECTOR_BYTES == 32
  return (Vec<float>::Native)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  return (Vec<float>::Native)vcvt_f32_f16((float16x4_t)x);
#else
  using F = Vec<float>::Native;
  using I = Vec<float>::Bits;
  const I bits = __builtin_convertvector(x, I), magnitude = bits & 0x7fff;
  const F normal = (F)((magnitude << 13) + (112 << 23));
  const F small = __builtin_convertvector(magnitude, F) * 0x1p-24f;
  const F special = (F)((magnitude << 13) | 0x7f800000);
  const F value = magnitude < 0x400 ? small : magnitude >= 0x7c00 ? special : normal;
  return (F)((I)value | (bits & 0x8000) << 16);
#endif
}

template <class T>
FASTRNN_HD typename Vec<T>::Native to_storage(Vec<T> x, const T*) {
  return x.v;
}
// Round to nearest even, as torch does. The processor's own instruction, like its products, takes denormal numbers for 0,
// which are below 1e-38 here.
FASTRNN_HD Half16 to_storage(Vec<float> x, const BFloat16*) {
#if defined(FASTRNN_AVX512BF16)
  return (Half16)_mm512_cvtneps_pbh((__m512)x.v);
#endif
  using I = Vec<float>::Bits;
  const I bits = (I)x.v;
  const I rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const I value = x.v != x.v ? I{} + 0x7fc0 : rounded;
  return __builtin_convertvector(value & 0xffff, Half16);
}
FASTRNN_HD Half16 to_storage(Vec<float> x, const Half*) {
#if FASTRNN_VECTOR_BYTES == 64
  return (Half16)_mm512_maskz_cvtps_ph(0xffff, (__m512)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif FASTRNN_VECTOR_BYTES == 32
  return (Half16)_mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (Half16)vcvt_f16_f32((float32x4_t)x.v);
#else
  using F = Vec<float>::Native;
  using I = Vec<float>::Bits;
  const I bits = (I)x.v, magnitude = bits & 0x7fffffff;
  const I normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves a subnormal's rounded mantissa in the low bits.
  const I small = (I)((F)magnitude + 0.5f) - 0x3f000000;
  const I large = magnitude > 0x7f800000 ? I{} + 0x7e00 : I{} + 0x7c00;
  const I value = magnitude < 0x38800000 ? small : magnitude >= 0x477ff000 ? large : normal;
  return __builtin_convertvector((value | ((bits >> 16) & 0x8000)) & 0xffff, Half16);
#endif
}

template <class S>
FASTRNN_HD Vec<typename Compute<S>::type> load(const S* p, int n) {
  using V = Vec<typename Compute<S>::type>;
  decltype(to_storage(V(), p)) x{};
  if (n >= V::kLanes)
    __builtin_memcpy(&x, p, sizeof x);
  else
    for (int k = 0; k < n; ++k) __builtin_memcpy(reinterpret_cast<S*>(&x) + k, p + k, sizeof(S));
  return from_storage(x, p);
}
template <class S>
FASTRNN_HD Vec<typename Compute<S>::type> load(const S* p) {
  return load(p, Vec<typename Compute<S>::type>::kLanes);
}

template <class S, class T>
FASTRNN_HD void store(S* p, Vec<T> value, int n) {
  const auto x = to_storage(value, static_cast<const S*>(p));
  if (n >= Vec<T>::kLanes)
    __builtin_memcpy(p, &x, sizeof x);
  else
    __builtin_memcpy(p, &x, n * sizeof(S));
}
template <class S, class T>
FASTRNN_HD void store(S* p, Vec<T> value) {
  store(p, value, Vec<T>::kLanes);
}

// How many lanes of a vector that starts at j are among `size`.
template <class T>
FASTRNN_HD int valid_lanes(int64_t size, int64_t j) {
  return int(size - j < Vec<T>::kLanes ? size - j : Vec<T>::kLanes);
}

// Of `size` values those in vectors v .. v + vectors - 1.
template <class T>
FASTRNN_HD int64_t columns_of(int64_t v, int vectors, int64_t size) {
  const int64_t left = size - v * Vec<T>::kLanes, all = vectors * Vec<T>::kLanes;
  return left < all ? left : all;
}

// body(j, n) for each vector of units, j .. j + n - 1: all but the last are whole, and what is compiled for those knows it.
template <class T, class Body>
FASTRNN_HD void for_each_vector(int64_t units, Body body) {
  constexpr int L = Vec<T>::kLanes;
  int64_t j = 0;
  for (; j + L <= units; j += L) body(j, L);
  if (j < units) body(j, int(units - j));
}

// Numbers 0 and 1 out of bytes. Step by step, for the compiler takes bytes that are to be words apart one by one.
template <class T>
FASTRNN_HD Vec<T> load_bools(const uint8_t* p, int n) {
  using C = Traits<T>;
  typename C::Bytes x{};
  if (n >= Vec<T>::kLanes)
    __builtin_memcpy(&x, p, sizeof x);
  else
    __builtin_memcpy(&x, p, n > 0 ? n : 0);
#if FASTRNN_VECTOR_BYTES == 64
  if constexpr (sizeof x == 16)
    return __builtin_convertvector((typename C::Words)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)x), typename C::Native);
#endif
  const auto words = __builtin_convertvector(__builtin_convertvector(x, typename C::Half16), typename C::Words);
  return __builtin_convertvector(words, typename C::Native);
}

// Floats that are not rounded though they are where those of a half type will be: their upper 16 bits are there, and the
// others at `lower`.
template <class S>
FASTRNN_HD Vec<float> load_split(const S* upper, const S* lower, int n) {
  using Bits = Vec<float>::Bits;
  const auto bits = [n](const S* p) { return (Bits)load(reinterpret_cast<const BFloat16*>(p), n).v; };  // << 16
  return (Vec<float>::Native)(bits(upper) | (bits(lower) >> 16 & 0xffff));
}
template <class S>
FASTRNN_HD void store_split(S* upper, S* lower, Vec<float> value, int n) {
  const Vec<float>::Bits bits = (Vec<float>::Bits)value.v;
  const Half16 high = __builtin_convertvector(bits >> 16 & 0xffff, Half16);
  const Half16 low = __builtin_convertvector(bits & 0xffff, Half16);
  if (n >= Vec<float>::kLanes) {
    __builtin_memcpy(upper, &high, sizeof high);
    __builtin_memcpy(lower, &low, sizeof low);
  } else {
    __builtin_memcpy(upper, &high, n * sizeof *upper);
    __builtin_memcpy(lower, &low, n * sizeof *lower);
  }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
