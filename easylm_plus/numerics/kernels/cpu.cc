// Products with few tokens on a CPU, called by XLA. Two kinds of weights:
//
//   ternary   y = (xq Wq) gamma / s   xq int8, rounded here, one s a token; Wq in {-1, 0, 1}, 256 codes to 64 bytes
//                                     (packed_ternary.py has the layout); sums in int32, exact
//   rows      y = (x . codes) scale   x float32, codes int8, one scale a row (int8_rows.py); sums in float32
//
// A product with one token reads each weight once and is bound by memory, so the weights stay as packed as they are:
// a byte of four codes is masked, not unpacked. Two bits hold code + 1 in {0, 1, 2}, and
//
//   sum_k x_k (code_k + 1) - sum_k x_k = sum_k x_k code_k
//
// Written for AVX-512 VNNI, AVX2 and any processor; which one runs is chosen by the caller among what this one has.
// Rows are cut into chunks, which XLA's own threads take one by one: a thread that comes late delays nobody.
//
// Compile without contraction: x * s must be rounded before it is rounded to a whole number, as XLA does it.
//
// Legend: N tokens, D in-features, P in-features padded to blocks, F rows (out-features).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))
#endif

namespace {

namespace ffi = xla::ffi;

enum Level : int64_t { kPortable = 0, kAvx2 = 1, kVnni = 2 };

constexpr int64_t kBlock = 256, kBlockBytes = 64;
constexpr int64_t kMostTokens = 8;
constexpr int64_t kRows = 64;               // rows whose sums wait for their scales
constexpr int64_t kChunkBytes = 48 * 1024;  // of weights that a thread takes at once: some microseconds
constexpr int64_t kAhead = 4096;            // bytes of weights asked for before they are needed: without it, and where
                                            // several rows are read at a time, memory is read a third as fast
constexpr float kEps = 1e-5f;               // ternary.EPS
constexpr float kStep = 1.0f / 127.0f;      // packed_ternary.STEP

// --- threads ---

template <typename Work>
void InParallel(ffi::ThreadPool& pool, int64_t chunks, const Work& work) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), chunks) - 1;
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();  // a helper may start after all is done
  auto take = [state, chunks, &work] {
    for (int64_t c; (c = state->next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      work(c);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) {
    auto own = take;
    pool.Schedule(std::move(own));
  }
  take();
  for (int64_t spins = 0; state->done.load(std::memory_order_acquire) < chunks; ++spins) {
    if (spins > 2000) std::this_thread::yield();  // the helper may have lost its core
#if defined(__x86_64__)
    else _mm_pause();
#endif
  }
}

// work(first row, last row + 1) for all rows, in chunks of whole kRows.
template <typename Work>
void OverRows(ffi::ThreadPool& pool, int64_t rows, int64_t row_bytes, const Work& work) {
  const int64_t per_chunk = std::max<int64_t>(1, kChunkBytes / (row_bytes * kRows)) * kRows;
  const int64_t chunks = (rows + per_chunk - 1) / per_chunk;
  auto one = [&](int64_t c) { work(c * per_chunk, std::min(rows, (c + 1) * per_chunk)); };
  if (chunks == 1) return one(0);
  InParallel(pool, chunks, one);
}

// --- floats ---

inline float Wide(float x) { return x; }
inline float Wide(uint16_t bfloat16) {
  uint32_t bits = uint32_t{bfloat16} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void Narrow(float x, float* out) { *out = x; }
inline void Narrow(float x, uint16_t* out) {  // to bfloat16, half to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  *out = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// One token, beside its codes.
struct Token {
  float largest;  // the magnitude that the largest code stands for; NaN if something is not finite
  int32_t sum;    // of codes
};

template <typename X>
__attribute__((always_inline)) inline Token RoundToken(const X* x, int64_t D, int64_t P, int8_t* codes) {
  int32_t largest = 0;  // as bits: they order as the magnitudes do, NaN above infinity
  for (int64_t k = 0; k < D; ++k) {
    const float wide = Wide(x[k]);
    int32_t bits;
    std::memcpy(&bits, &wide, 4);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float most;
  std::memcpy(&most, &largest, 4);
  std::memset(codes, 0, P);
  if (largest >= 0x7f800000) {  // infinite or NaN: so is what comes out
    const uint32_t quiet = 0x7fc00000;
    float nan;
    std::memcpy(&nan, &quiet, 4);
    return {nan, 0};
  }
  most = std::max(most, kEps);
  const float scale = 127.0f / most, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
  int32_t sum = 0;
  for (int64_t k = 0; k < D; ++k) {
    const float shifted = Wide(x[k]) * scale + magic;
    int32_t code;
    std::memcpy(&code, &shifted, 4);
    code -= 0x4b400000;
    codes[k] = static_cast<int8_t>(code);
    sum += code;
  }
  return {most, sum};
}

// --- ternary sums: y[n * kRows + r] = sum_k x[n * P + k] (code[r, k] + 1) of at most kRows rows ---

void SumsPortable(const uint8_t* w, int64_t P, const int8_t* x, int64_t N, int64_t rows, int32_t* y) {
  const int64_t bytes = P / 4;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < N; ++n) {
      int32_t sum = 0;
      for (int64_t b = 0; b < bytes; b += kBlockBytes) {
        const uint8_t* p = w + r * bytes + b;
        const int8_t* v = x + n * P + 4 * b;
        for (int j = 0; j < kBlockBytes; ++j) {
          sum += (p[j] & 3) * v[j] + (p[j] >> 2 & 3) * v[j + 64] + (p[j] >> 4 & 3) * v[j + 128] + (p[j] >> 6) * v[j + 192];
        }
      }
      y[n * kRows + r] = sum;
    }
  }
}

#if defined(__x86_64__)

TARGET_AVX2 inline int32_t Total(__m256i x) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

template <int N>
TARGET_AVX2 void SumsAvx2(const uint8_t* w, int64_t P, const int8_t* x, int64_t rows, int32_t* y) {
  const int64_t bytes = P / 4;
  const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  for (int64_t r = 0; r < rows; ++r) {
    __m256i sums[N];
    for (int n = 0; n < N; ++n) sums[n] = _mm256_setzero_si256();
    for (int64_t b = 0; b < bytes; b += 32) {  // half a block
      _mm_prefetch(w + r * bytes + b + kAhead, _MM_HINT_T0);
      const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + r * bytes + b));
      const __m256i codes[4] = {
          _mm256_and_si256(p, three), _mm256_and_si256(_mm256_srli_epi16(p, 2), three),
          _mm256_and_si256(_mm256_srli_epi16(p, 4), three), _mm256_and_si256(_mm256_srli_epi16(p, 6), three)};
      const int8_t* at = x + (b & ~int64_t{63}) * 4 + (b & 63);
      for (int n = 0; n < N; ++n) {
        __m256i pairs = _mm256_setzero_si256();  // in 16 bits: at most 4 * 2 * 2 * 128
        for (int q = 0; q < 4; ++q) {
          const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + n * P + 64 * q));
          pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[q], v));
        }
        sums[n] = _mm256_add_epi32(sums[n], _mm256_madd_epi16(pairs, ones));
      }
    }
    for (int n = 0; n < N; ++n) y[n * kRows + r] = Total(sums[n]);
  }
}

template <int N>
TARGET_VNNI void SumsVnni(const uint8_t* w, int64_t P, const int8_t* x, int64_t rows, int32_t* y) {
  const int64_t bytes = P / 4;
  const __m512i three = _mm512_set1_epi8(3);
  for (int64_t r = 0; r < rows; ++r) {
    __m512i sums[N];
    for (int n = 0; n < N; ++n) sums[n] = _mm512_setzero_si512();
    for (int64_t b = 0; b < bytes; b += 64) {
      const uint8_t* at = w + r * bytes + b;
      _mm_prefetch(at + kAhead, _MM_HINT_T0);
      const __m512i p = _mm512_loadu_si512(at);
      const __m512i codes[4] = {
          _mm512_and_si512(p, three), _mm512_and_si512(_mm512_srli_epi16(p, 2), three),
          _mm512_and_si512(_mm512_srli_epi16(p, 4), three), _mm512_and_si512(_mm512_srli_epi16(p, 6), three)};
      for (int n = 0; n < N; ++n) {
        for (int q = 0; q < 4; ++q) {
          sums[n] = _mm512_dpbusd_epi32(sums[n], codes[q], _mm512_loadu_si512(x + n * P + 4 * b + 64 * q));
        }
      }
    }
    for (int n = 0; n < N; ++n) y[n * kRows + r] = _mm512_reduce_add_epi32(sums[n]);
  }
}

// One token: codes are not shifted. The sums of the second to fourth are 4, 16 and 64 times too large, which shifting
// the sums undoes exactly; they are below 2^31 as long as P < 2^19.
template <>
TARGET_VNNI void SumsVnni<1>(const uint8_t* w, int64_t P, const int8_t* x, int64_t rows, int32_t* y) {
  const int64_t bytes = P / 4;
  const __m512i masks[4] = {_mm512_set1_epi8(3), _mm512_set1_epi8(12), _mm512_set1_epi8(48),
                            _mm512_set1_epi8(static_cast<char>(192))};
  for (int64_t r = 0; r < rows; ++r) {
    __m512i sums[4];
    for (__m512i& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t b = 0; b < bytes; b += 64) {
      const uint8_t* at = w + r * bytes + b;
      _mm_prefetch(at + kAhead, _MM_HINT_T0);
      const __m512i p = _mm512_loadu_si512(at);
      for (int q = 0; q < 4; ++q) {
        const __m512i v = _mm512_loadu_si512(x + 4 * b + 64 * q);
        sums[q] = _mm512_dpbusd_epi32(sums[q], _mm512_and_si512(p, masks[q]), v);
      }
    }
    const __m512i low = _mm512_add_epi32(sums[0], _mm512_srai_epi32(sums[1], 2));
    const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(sums[2], 4), _mm512_srai_epi32(sums[3], 6));
    y[r] = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
  }
}

#define FOR_EACH_COUNT(f) {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>}

#endif

void Sums(int64_t level, const uint8_t* w, int64_t P, const int8_t* x, int64_t N, int64_t rows, int32_t* y) {
#if defined(__x86_64__)
  using Kernel = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);
  static constexpr Kernel kAvx2s[] = FOR_EACH_COUNT(SumsAvx2), kVnnis[] = FOR_EACH_COUNT(SumsVnni);
  if (level == kVnni) return kVnnis[N - 1](w, P, x, rows, y);
  if (level == kAvx2) return kAvx2s[N - 1](w, P, x, rows, y);
#endif
  SumsPortable(w, P, x, N, rows, y);
}

template <typename X>
Token RoundPortable(const X* x, int64_t D, int64_t P, int8_t* codes) { return RoundToken(x, D, P, codes); }
#if defined(__x86_64__)
template <typename X>
TARGET_AVX2 Token RoundAvx2(const X* x, int64_t D, int64_t P, int8_t* codes) { return RoundToken(x, D, P, codes); }
template <typename X>
TARGET_VNNI Token RoundVnni(const X* x, int64_t D, int64_t P, int8_t* codes) { return RoundToken(x, D, P, codes); }
#endif

template <typename X>
Token Round(int64_t level, const X* x, int64_t D, int64_t P, int8_t* codes) {
#if defined(__x86_64__)
  if (level == kVnni) return RoundVnni(x, D, P, codes);
  if (level == kAvx2) return RoundAvx2(x, D, P, codes);
#endif
  return RoundPortable(x, D, P, codes);
}

struct Shape {
  int64_t N, D, P, F;
};

template <typename X>
void Ternary(ffi::ThreadPool& pool, int64_t level, Shape s, const X* x, const uint8_t* w, float gamma, X* y) {
  std::vector<int8_t> codes(s.N * s.P);
  Token tokens[kMostTokens];
  float factors[kMostTokens];
  for (int64_t n = 0; n < s.N; ++n) {
    tokens[n] = Round(level, x + n * s.D, s.D, s.P, codes.data() + n * s.P);
    factors[n] = tokens[n].largest * (kStep * gamma);
  }
  OverRows(pool, s.F, s.P / 4, [&](int64_t from, int64_t to) {
    int32_t sums[kMostTokens * kRows];
    for (int64_t r = from; r < to; r += kRows) {
      const int64_t rows = std::min(kRows, to - r);
      Sums(level, w + r * (s.P / 4), s.P, codes.data(), s.N, rows, sums);
      for (int64_t n = 0; n < s.N; ++n)
        for (int64_t i = 0; i < rows; ++i)
          Narrow(static_cast<float>(sums[n * kRows + i] - tokens[n].sum) * factors[n], y + n * s.F + r + i);
    }
  });
}

// int8 activations that are rounded already -> the sums.
void Integer(ffi::ThreadPool& pool, int64_t level, Shape s, const int8_t* x, const uint8_t* w, int32_t* y) {
  std::vector<int8_t> codes(s.N * s.P);
  int32_t totals[kMostTokens] = {};
  for (int64_t n = 0; n < s.N; ++n) {
    std::memcpy(codes.data() + n * s.P, x + n * s.D, s.D);
    for (int64_t k = 0; k < s.D; ++k) totals[n] += x[n * s.D + k];
  }
  OverRows(pool, s.F, s.P / 4, [&](int64_t from, int64_t to) {
    int32_t sums[kMostTokens * kRows];
    for (int64_t r = from; r < to; r += kRows) {
      const int64_t rows = std::min(kRows, to - r);
      Sums(level, w + r * (s.P / 4), s.P, codes.data(), s.N, rows, sums);
      for (int64_t n = 0; n < s.N; ++n)
        for (int64_t i = 0; i < rows; ++i) y[n * s.F + r + i] = sums[n * kRows + i] - totals[n];
    }
  });
}

// --- rows of int8: y[n * kRows + r] = sum_k x[n * D + k] code[r, k] of at most kRows rows ---

void DotsPortable(const int8_t* w, int64_t D, const float* x, int64_t N, int64_t rows, float* y) {
  constexpr int kLanes = 16;
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* codes = w + r * D;
    for (int64_t n = 0; n < N; ++n) {
      float sums[kLanes] = {};
      const float* v = x + n * D;
      int64_t k = 0;
      for (; k + kLanes <= D; k += kLanes)
        for (int i = 0; i < kLanes; ++i) sums[i] += v[k + i] * static_cast<float>(codes[k + i]);
      float sum = 0;
      for (; k < D; ++k) sum += v[k] * static_cast<float>(codes[k]);
      for (float part : sums) sum += part;
      y[n * kRows + r] = sum;
    }
  }
}

#if defined(__x86_64__)

TARGET_AVX2 inline float Total(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <int N>
TARGET_AVX2 void DotsAvx2(const int8_t* w, int64_t D, const float* x, int64_t rows, float* y) {
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* codes = w + r * D;
    __m256 sums[N][2];
    for (int n = 0; n < N; ++n) sums[n][0] = sums[n][1] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= D; k += 16) {
      _mm_prefetch(codes + k + kAhead, _MM_HINT_T0);
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k));
      const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
      const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(eight, eight)));
      for (int n = 0; n < N; ++n) {
        sums[n][0] = _mm256_fmadd_ps(low, _mm256_loadu_ps(x + n * D + k), sums[n][0]);
        sums[n][1] = _mm256_fmadd_ps(high, _mm256_loadu_ps(x + n * D + k + 8), sums[n][1]);
      }
    }
    for (int n = 0; n < N; ++n) {
      float sum = Total(_mm256_add_ps(sums[n][0], sums[n][1]));
      for (int64_t i = k; i < D; ++i) sum += x[n * D + i] * static_cast<float>(codes[i]);
      y[n * kRows + r] = sum;
    }
  }
}

template <int N>
TARGET_VNNI void DotsVnni(const int8_t* w, int64_t D, const float* x, int64_t rows, float* y) {
  constexpr int C = N == 1 ? 4 : N <= 4 ? 2 : 1;  // chains of sums, so that none waits for the one before
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* at = w + r * D;
    __m512 sums[N][C];
    for (int n = 0; n < N; ++n)
      for (int c = 0; c < C; ++c) sums[n][c] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 16 * C <= D; k += 16 * C) {
      _mm_prefetch(at + k + kAhead, _MM_HINT_T0);
      for (int c = 0; c < C; ++c) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + k + 16 * c));
        const __m512 codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(eight));
        for (int n = 0; n < N; ++n)
          sums[n][c] = _mm512_fmadd_ps(codes, _mm512_loadu_ps(x + n * D + k + 16 * c), sums[n][c]);
      }
    }
    for (; k < D; k += 16) {  // what is left of a row is masked
      const __mmask16 mask = D - k < 16 ? static_cast<__mmask16>((1u << (D - k)) - 1) : 0xffff;
      const __m512 codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, at + k)));
      for (int n = 0; n < N; ++n)
        sums[n][0] = _mm512_fmadd_ps(codes, _mm512_maskz_loadu_ps(mask, x + n * D + k), sums[n][0]);
    }
    for (int n = 0; n < N; ++n) {
      for (int c = 1; c < C; ++c) sums[n][0] = _mm512_add_ps(sums[n][0], sums[n][c]);
      y[n * kRows + r] = _mm512_reduce_add_ps(sums[n][0]);
    }
  }
}

#endif

void Dots(int64_t level, const int8_t* w, int64_t D, const float* x, int64_t N, int64_t rows, float* y) {
#if defined(__x86_64__)
  using Kernel = void (*)(const int8_t*, int64_t, const float*, int64_t, float*);
  static constexpr Kernel kAvx2s[] = FOR_EACH_COUNT(DotsAvx2), kVnnis[] = FOR_EACH_COUNT(DotsVnni);
  if (level == kVnni) return kVnnis[N - 1](w, D, x, rows, y);
  if (level == kAvx2) return kAvx2s[N - 1](w, D, x, rows, y);
#endif
  DotsPortable(w, D, x, N, rows, y);
}

template <typename X>
void Rows(ffi::ThreadPool& pool, int64_t level, Shape s, const X* x, const int8_t* w, const float* scale, X* y) {
  std::vector<float> wide(s.N * s.D);
  std::transform(x, x + s.N * s.D, wide.begin(), [](X v) { return Wide(v); });
  OverRows(pool, s.F, s.D, [&](int64_t from, int64_t to) {
    float dots[kMostTokens * kRows];
    for (int64_t r = from; r < to; r += kRows) {
      const int64_t rows = std::min(kRows, to - r);
      Dots(level, w + r * s.D, s.D, wide.data(), s.N, rows, dots);
      for (int64_t n = 0; n < s.N; ++n)
        for (int64_t i = 0; i < rows; ++i) Narrow(dots[n * kRows + i] * scale[r + i], y + n * s.F + r + i);
    }
  });
}

// --- what XLA calls ---

ffi::Error Wrong(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

ffi::Error Checked(int64_t level, Shape s) {
  if (s.N < 1 || s.N > kMostTokens) return Wrong("expected 1 to 8 tokens");
  if (s.P >= int64_t{1} << 19) return Wrong("expected fewer than 2^19 in-features");
  if (level < kPortable || level > kVnni) return Wrong("unknown level");
  return ffi::Error::Success();
}

ffi::Error TernaryCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> w, ffi::Buffer<ffi::F32> gamma,
                       ffi::Result<ffi::AnyBuffer> y, int64_t level) {
  const auto xd = x.dimensions(), wd = w.dimensions();
  if (xd.size() != 2 || wd.size() != 2 || gamma.element_count() != 1) return Wrong("expected x[N, D], w[F, P/4], gamma");
  const Shape s{xd[0], xd[1], 4 * wd[1], wd[0]};
  if (s.P % kBlock || s.P < s.D || s.P - s.D >= kBlock) return Wrong("expected in-features padded to whole blocks");
  if (ffi::Error error = Checked(level, s); error.failure()) return error;
  if (x.element_type() != y->element_type()) return Wrong("expected y in x's dtype");
  const float g = *gamma.typed_data();
  if (x.element_type() == ffi::F32) {
    Ternary(pool, level, s, static_cast<const float*>(x.untyped_data()), w.typed_data(), g,
            static_cast<float*>(y->untyped_data()));
  } else if (x.element_type() == ffi::BF16) {
    Ternary(pool, level, s, static_cast<const uint16_t*>(x.untyped_data()), w.typed_data(), g,
            static_cast<uint16_t*>(y->untyped_data()));
  } else {
    return Wrong("expected float32 or bfloat16");
  }
  return ffi::Error::Success();
}

ffi::Error IntegerCall(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::U8> w,
                       ffi::ResultBuffer<ffi::S32> y, int64_t level) {
  const auto xd = x.dimensions(), wd = w.dimensions();
  if (xd.size() != 2 || wd.size() != 2) return Wrong("expected x[N, D], w[F, P/4]");
  const Shape s{xd[0], xd[1], 4 * wd[1], wd[0]};
  if (s.P % kBlock || s.P < s.D || s.P - s.D >= kBlock) return Wrong("expected in-features padded to whole blocks");
  if (ffi::Error error = Checked(level, s); error.failure()) return error;
  Integer(pool, level, s, x.typed_data(), w.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

ffi::Error RowsCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S8> w, ffi::Buffer<ffi::F32> scale,
                    ffi::Result<ffi::AnyBuffer> y, int64_t level) {
  const auto xd = x.dimensions(), wd = w.dimensions();
  if (xd.size() != 2 || wd.size() != 2 || xd[1] != wd[1]) return Wrong("expected x[N, D], w[F, D]");
  const Shape s{xd[0], xd[1], xd[1], wd[0]};
  if (static_cast<int64_t>(scale.element_count()) != s.F) return Wrong("expected a scale a row");
  if (ffi::Error error = Checked(level, s); error.failure()) return error;
  if (x.element_type() != y->element_type()) return Wrong("expected y in x's dtype");
  if (x.element_type() == ffi::F32) {
    Rows(pool, level, s, static_cast<const float*>(x.untyped_data()), w.typed_data(), scale.typed_data(),
         static_cast<float*>(y->untyped_data()));
  } else if (x.element_type() == ffi::BF16) {
    Rows(pool, level, s, static_cast<const uint16_t*>(x.untyped_data()), w.typed_data(), scale.typed_data(),
         static_cast<uint16_t*>(y->untyped_data()));
  } else {
    return Wrong("expected float32 or bfloat16");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TernaryProduct, TernaryCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("level"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(IntegerProduct, IntegerCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("level"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(RowsProduct, RowsCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("level"));

// The best level that this processor has.
extern "C" int64_t BestLevel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return kVnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}
