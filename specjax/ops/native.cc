// Products of few rows by large matrices, which memory bounds: every weight is read once, in its order.
//
// Each sum runs in one order whatever stands beside it, so that a row's numbers do not depend on how many rows there
// are. The work is shared out over the threads of XLA's own pool: others would spin beside them.
#ifndef KERNELS

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using bf16 = uint16_t;

// One product: y[t, o] = sum_i x[t, i] w[o, i]. Rows [begin, end) of w are computed by one call.
struct Product {
  const void* x;
  const void* w;
  float* y;
  int64_t rows, outputs, inputs;
};
using Kernel = void (*)(const Product&, int64_t begin, int64_t end);

// Attention of `queries` rows for each of `heads` key/value heads: rows of one head are [group, token]. Keys have their
// slots last, values their width. The prefix's slots [first, end) come before the new tokens, in one order of sums.
struct Attention {
  const float *q, *k, *v, *prefix_k, *prefix_v;
  const bool *mask, *prefix_mask;
  float* out;
  int64_t heads, queries, tokens, width, slots, first, end;
};
using AttentionKernel = void (*)(const Attention&, int64_t piece);
// y[t, d] = x[t, d] scale[d] / sqrt(mean of x[t]^2 + eps), for one row.
using NormKernel = void (*)(const float* x, const float* scale, float eps, int64_t width, float* y);
constexpr float kUnseen = -3e38f;
constexpr int kQueries = 4;  // rows that one piece of work reads the cache for

// Work in pieces that threads take one by one. The caller takes pieces too and waits only for those that others have
// begun, so that a busy pool cannot make it wait for ever; late helpers find nothing left, and the last one cleans up.
class Shared {
 public:
  template <class Pool, class Work>
  static void run(Pool& pool, int64_t pieces, const Work& work) {
    int64_t helpers = std::min<int64_t>(pool.num_threads(), pieces) - 1;
    if (helpers <= 0) {
      for (int64_t i = 0; i < pieces; ++i) work(i);
      return;
    }
    auto* state = new Shared(pieces, helpers + 1);
    const Work* task = &work;
    for (int64_t i = 0; i < helpers; ++i) {
      pool.Schedule([state, task] {
        state->take(*task);
        state->release();
      });
    }
    state->take(work);
    while (state->done_.load(std::memory_order_acquire) < pieces) pause();
    state->release();
  }

 private:
  Shared(int64_t pieces, int64_t owners) : pieces_(pieces), owners_(owners) {}

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  template <class Work>
  void take(const Work& work) {
    // `work` lives on the caller's stack: it is touched only while a piece is held, for which the caller waits.
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < pieces_;) {
      work(i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void release() {
    if (owners_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  const int64_t pieces_;
  std::atomic<int64_t> next_{0}, done_{0}, owners_;
};

}  // namespace

#define KERNELS
#if defined(__x86_64__)

#define VECTOR 64
#define TILE 8
#define DOT_BF16
#define SPACE avx512bf16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif
#include "native.cc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DOT_BF16
#undef SPACE
#define SPACE avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#include "native.cc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SPACE
#undef VECTOR
#undef TILE
#define VECTOR 32
#define TILE 4
#define SPACE avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "native.cc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
#define VECTOR 16
#define TILE 6
#define SPACE neon
#include "native.cc"
#endif

namespace {

struct Kernels {
  Kernel in_f32, in_bf16;
  AttentionKernel attention;
  NormKernel norm;
};

// What this CPU runs; SPECJAX_CPU_ISA names a lesser one, for tests.
const Kernels& kernels() {
  static const Kernels found = [] {
    const char* most = std::getenv("SPECJAX_CPU_ISA");
    auto may = [&](const char* name) { return most == nullptr || std::strcmp(most, name) == 0; };
    (void)may;
#if defined(__x86_64__)
    bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512bf16") && may("avx512bf16"))
      return Kernels{avx512bf16::rows<float>, avx512bf16::rows<bf16>, avx512bf16::attend, avx512bf16::norm};
    if (wide && may("avx512")) return Kernels{avx512::rows<float>, avx512::rows<bf16>, avx512::attend, avx512::norm};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && may("avx2"))
      return Kernels{avx2::rows<float>, avx2::rows<bf16>, avx2::attend, avx2::norm};
    return Kernels{};
#else
    return Kernels{neon::rows<float>, neon::rows<bf16>, neon::attend, neon::norm};
#endif
  }();
  return found;
}

ffi::Error Dot(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 2 || ys.size() != 2 || xs[1] != ws[1] || ys[0] != xs[0] || ys[1] != ws[0])
    return ffi::Error::InvalidArgument("the product takes x [T I], w [O I] and gives y [T O]");
  if (x.element_type() != w.element_type()) return ffi::Error::InvalidArgument("x and w have different dtypes");
  Kernel rows = w.element_type() == ffi::F32    ? kernels().in_f32
                : w.element_type() == ffi::BF16 ? kernels().in_bf16
                                                : nullptr;
  if (rows == nullptr) return ffi::Error::InvalidArgument("the product takes float32 or bfloat16 on this CPU");
  Product product{x.untyped_data(), w.untyped_data(), y->typed_data(), xs[0], ws[0], ws[1]};
  // Pieces of at least 32 KB, so that taking one costs little, and several for each thread.
  int64_t width = ws[1] * (w.element_type() == ffi::F32 ? 4 : 2);
  int64_t least = std::max<int64_t>(1, (32 << 10) / std::max<int64_t>(width, 1));
  int64_t size = std::max<int64_t>(least, ws[0] / (16 * std::max<int64_t>(1, pool.num_threads())));
  size = (size + 23) / 24 * 24;
  int64_t pieces = (ws[0] + size - 1) / size;
  Shared::run(pool, pieces, [&](int64_t i) { rows(product, i * size, std::min(ws[0], (i + 1) * size)); });
  return ffi::Error::Success();
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                  ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::F32> prefix_k, ffi::Buffer<ffi::F32> prefix_v,
                  ffi::Buffer<ffi::PRED> prefix_mask, ffi::Buffer<ffi::S32> first, ffi::Buffer<ffi::S32> end,
                  ffi::Result<ffi::Buffer<ffi::F32>> out) {
  auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), ms = mask.dimensions();
  auto pk = prefix_k.dimensions(), pv = prefix_v.dimensions(), pm = prefix_mask.dimensions(), os = out->dimensions();
  if (qs.size() != 3 || ks.size() != 3 || vs.size() != 3 || ms.size() != 2 || pk.size() != 3 || pv.size() != 3 ||
      pm.size() != 2 || os.size() != 3)
    return ffi::Error::InvalidArgument("attention takes q [K GT H], k [K H T], v [K T H] and masks of two axes");
  int64_t heads = qs[0], queries = qs[1], width = qs[2], tokens = ms[0], slots = pk[2];
  auto is = [](auto dims, int64_t a, int64_t b, int64_t c) { return dims[0] == a && dims[1] == b && dims[2] == c; };
  if (!is(ks, heads, width, tokens) || !is(vs, heads, tokens, width) || !is(pk, heads, width, slots) ||
      !is(pv, heads, slots, width) || !is(os, heads, queries, width) || ms[1] != tokens || pm[0] != tokens ||
      pm[1] != slots || tokens == 0 || queries % tokens != 0 || first.element_count() != 1 || end.element_count() != 1)
    return ffi::Error::InvalidArgument("the shapes of queries, keys, values and masks do not fit each other");
  if (kernels().attention == nullptr) return ffi::Error::InvalidArgument("no kernel for this CPU");
  int64_t from = std::clamp<int64_t>(first.typed_data()[0], 0, slots);
  int64_t to = std::clamp<int64_t>(end.typed_data()[0], from, slots);
  Attention work{q.typed_data(), k.typed_data(), v.typed_data(), prefix_k.typed_data(), prefix_v.typed_data(),
                 mask.typed_data(), prefix_mask.typed_data(), out->typed_data(),
                 heads, queries, tokens, width, slots, from, to};
  int64_t tiles = (queries + kQueries - 1) / kQueries;
  Shared::run(pool, heads * tiles, [&](int64_t piece) { kernels().attention(work, piece); });
  return ffi::Error::Success();
}

ffi::Error Norm(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale, float eps,
                ffi::Result<ffi::Buffer<ffi::F32>> y) {
  auto xs = x.dimensions();
  if (xs.size() != 2 || scale.element_count() != static_cast<size_t>(xs[1]) || y->element_count() != x.element_count())
    return ffi::Error::InvalidArgument("the norm takes x [T D] and scale [D]");
  if (kernels().norm == nullptr) return ffi::Error::InvalidArgument("no kernel for this CPU");
  for (int64_t t = 0; t < xs[0]; ++t)
    kernels().norm(x.typed_data() + t * xs[1], scale.typed_data(), eps, xs[1], y->typed_data() + t * xs[1]);
  return ffi::Error::Success();
}

}  // namespace

extern "C" int SpecjaxServes() { return kernels().in_f32 != nullptr; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxDot, Dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxAttend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxNorm, Norm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Ret<ffi::Buffer<ffi::F32>>());

#else  // the kernels, once for each instruction set

namespace {
namespace SPACE {

constexpr int kLanes = VECTOR / 4;
typedef float Floats __attribute__((vector_size(VECTOR)));
typedef float LooseFloats __attribute__((vector_size(VECTOR), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(VECTOR)));
typedef int32_t Signed __attribute__((vector_size(VECTOR)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(VECTOR / 2), aligned(2), may_alias));

// The first `n` elements, or all of a vector's; zeros after them.
template <class W, class V>
inline V partly(const W* at, int64_t n) {
  W whole[sizeof(V) / sizeof(W)] = {};
  std::memcpy(whole, at, n * sizeof(W));
  V vector;
  std::memcpy(&vector, whole, sizeof(V));
  return vector;
}

// Lane by lane halves added to halves, for two vectors at once: half of the result is of the one, half of the other.
#if VECTOR == 64
inline Floats fold(Floats a, Floats b, std::integral_constant<int, 16>) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
inline Floats fold(Floats a, Floats b, std::integral_constant<int, 8>) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
inline Floats fold(Floats a, Floats b, std::integral_constant<int, 4>) {
  return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
inline Floats fold(Floats a, Floats b, std::integral_constant<int, 2>) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#elif VECTOR == 32
inline Floats fold(Floats a, Floats b, std::integral_constant<int, 8>) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
inline Floats fold(Floats a, Floats b, std::integral_constant<int, 4>) {
  return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}
inline Floats fold(Floats a, Floats b, std::integral_constant<int, 2>) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
#else
inline Floats fold(Floats a, Floats b, std::integral_constant<int, 4>) {
  return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
}
inline Floats fold(Floats a, Floats b, std::integral_constant<int, 2>) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}
#endif

// The sums of `kLanes` vectors, or of `count` and nothing, in order; each is added up as if it were alone.
template <int count, int lanes = kLanes>
inline __attribute__((always_inline)) Floats sums(const Floats* v) {
  if constexpr (count <= 0) {
    return Floats{};
  } else if constexpr (lanes == 1) {
    return v[0];
  } else {
    return fold(sums<(count < lanes / 2 ? count : lanes / 2), lanes / 2>(v), sums<count - lanes / 2, lanes / 2>(v + lanes / 2),
                std::integral_constant<int, 2 * kLanes / lanes>{});
  }
}

template <int count>
inline __attribute__((always_inline)) void store(const Floats* v, float* to) {
  Floats found = sums<(count < kLanes ? count : kLanes)>(v);
  std::memcpy(to, &found, sizeof(found));
  if constexpr (count > kLanes) store<count - kLanes>(v + kLanes, to + kLanes);
}

template <class W>
struct Arithmetic;

template <>
struct Arithmetic<float> {
  using V = Floats;
  static constexpr int step = kLanes;
  static V load(const float* at) { return *reinterpret_cast<const LooseFloats*>(at); }
  static void add(Floats& total, V a, V b) { total += a * b; }
};

template <>
struct Arithmetic<bf16> {
#ifdef DOT_BF16
  using V = __m512i;
  static constexpr int step = 2 * kLanes;
  static V load(const bf16* at) { return _mm512_loadu_si512(at); }
  static void add(Floats& total, V a, V b) {
    total = (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
  }
#else
  using V = Halves;
  static constexpr int step = kLanes;
  static V load(const bf16* at) { return *reinterpret_cast<const LooseHalves*>(at); }
  static Floats wide(V v) { return (Floats)(__builtin_convertvector(v, Words) << 16); }
  static void add(Floats& total, V a, V b) { total += wide(a) * wide(b); }
#endif
};

// R rows of w by T rows of x.
template <int R, int T, class W>
inline __attribute__((always_inline)) void block(const Product& p, const W* x, int64_t o, float* y) {
  using A = Arithmetic<W>;
  const W* w = static_cast<const W*>(p.w) + o * p.inputs;
  const int64_t n = p.inputs;
  Floats total[T * R] = {};
  int64_t i = 0;
  for (; i + A::step <= n; i += A::step) {
    typename A::V b[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      b[r] = A::load(w + r * n + i);
      __builtin_prefetch(w + (R + r) * n + i);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      typename A::V a = A::load(x + t * n + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) A::add(total[t * R + r], a, b[r]);
    }
  }
  if (i < n) {
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r)
        A::add(total[t * R + r], partly<W, typename A::V>(x + t * n + i, n - i),
               partly<W, typename A::V>(w + r * n + i, n - i));
  }
  float found[(T * R + kLanes - 1) / kLanes * kLanes];
  store<T * R>(total, found);
  for (int t = 0; t < T; ++t) std::memcpy(y + t * p.outputs + o, found + t * R, R * sizeof(float));
}

// Rows of w that are read together: as many sums as registers hold.
constexpr int together(int rows) {
#if VECTOR == 64
  return rows <= 2 ? 8 : rows <= 4 ? 6 : rows <= 6 ? 4 : 3;
#elif VECTOR == 32
  return rows <= 3 ? 4 : 3;
#else
  return rows <= 3 ? 8 : rows <= 4 ? 6 : 4;
#endif
}

// x in tiles of T rows, then of T - 1: as even as they can be.
template <int T, class W>
void tiles(const Product& p, int64_t begin, int64_t end) {
  constexpr int R = together(T);
  const int64_t count = (p.rows + T - 1) / T, full = p.rows - count * (T - 1);
  const W* x = static_cast<const W*>(p.x);
  auto sweep = [&](auto width, int64_t o) {
    constexpr int N = decltype(width)::value;
    for (int64_t tile = 0, t = 0; tile < count; ++tile) {
      if (tile < full) {
        block<N, T, W>(p, x + t * p.inputs, o, p.y + t * p.outputs);
        t += T;
      } else {
        if constexpr (T > 1) block<N, T - 1, W>(p, x + t * p.inputs, o, p.y + t * p.outputs);
        t += T - 1;
      }
    }
  };
  int64_t o = begin;
  for (; o + R <= end; o += R) sweep(std::integral_constant<int, R>{}, o);
  for (; o < end; ++o) sweep(std::integral_constant<int, 1>{}, o);
}

template <class W>
void rows(const Product& p, int64_t begin, int64_t end) {
  const int64_t count = (p.rows + TILE - 1) / TILE;
  switch ((p.rows + count - 1) / count) {
    case 1: return tiles<1, W>(p, begin, end);
    case 2: return tiles<2, W>(p, begin, end);
    case 3: return tiles<3, W>(p, begin, end);
    case 4: return tiles<4, W>(p, begin, end);
#if TILE > 4
    case 5: return tiles<5, W>(p, begin, end);
    case 6: return tiles<6, W>(p, begin, end);
#endif
#if TILE > 6
    case 7: return tiles<7, W>(p, begin, end);
    case 8: return tiles<8, W>(p, begin, end);
#endif
  }
}

void norm(const float* x, const float* scale, float eps, int64_t width, float* y) {
  Floats total = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    Floats v = Arithmetic<float>::load(x + d);
    total += v * v;
  }
  if (d < width) {
    Floats v = partly<float, Floats>(x + d, width - d);
    total += v * v;
  }
  const float factor = 1.0f / std::sqrt(sums<1>(&total)[0] / static_cast<float>(width) + eps);
  for (d = 0; d < width; ++d) y[d] = x[d] * factor * scale[d];
}

// exp(x) for x <= 0: a power of two by a polynomial (Cephes' expf), elementwise the same in every lane.
inline Floats exponential(Floats x) {
  const Floats least = Floats{} - 87.0f;
  Floats floor = x < least ? least : x;
  Floats scaled = floor * 1.44269504088896341f - 0.5f;
  auto n = __builtin_convertvector(scaled, Signed);  // towards zero: the nearest, for what is not positive
  Floats whole = __builtin_convertvector(n, Floats);
  Floats r = floor - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  Floats y = Floats{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Floats power = (Floats)((n + 127) << 23);
  Floats found = y * power;
  return x < least ? Floats{} : found;
}

// Scores of `count` keys, from `k` on, for R queries; invisible ones are the least number.
template <int R>
void score(const Attention& a, const float* const* q, const float* k, int64_t stride, const bool* const* seen,
           int64_t count, float* const* out) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, count - j);
    Floats total[R] = {};
    for (int64_t h = 0; h < a.width; ++h) {
      const float* at = k + h * stride + j;
      Floats keys = n == kLanes ? Arithmetic<float>::load(at) : partly<float, Floats>(at, n);
      for (int r = 0; r < R; ++r) total[r] += keys * q[r][h];
    }
    for (int r = 0; r < R; ++r) {
      float lanes[kLanes];
      std::memcpy(lanes, &total[r], sizeof(lanes));
      for (int64_t i = 0; i < n; ++i) out[r][j + i] = seen[r][j + i] ? lanes[i] : kUnseen;
    }
  }
}

// Adds `count` weighted values to R rows of one stretch of the width.
template <int R>
void mix(const float* v, int64_t stride, int64_t count, int64_t n, const float* const* weights, Floats* mixed,
         Floats* total) {
  for (int64_t j = 0; j < count; ++j) {
    const float* at = v + j * stride;
    Floats value = n == kLanes ? Arithmetic<float>::load(at) : partly<float, Floats>(at, n);
    for (int r = 0; r < R; ++r) {
      Floats weight = Floats{} + weights[r][j];
      mixed[r] += value * weight;
      total[r] += weight;
    }
  }
}

template <int R>
void queries(const Attention& a, int64_t head, int64_t begin) {
  const int64_t before = a.end - a.first, all = before + a.tokens, room = (all + kLanes - 1) / kLanes * kLanes;
  static thread_local std::vector<float> scratch;
  if (scratch.size() < static_cast<size_t>(R * room)) scratch.resize(R * room);
  const float *q[R], *weights[R], *later[R];
  const bool *seen[R], *new_seen[R];
  float *scores[R], *new_scores[R];
  for (int r = 0; r < R; ++r) {
    const int64_t row = begin + r, token = row % a.tokens;
    q[r] = a.q + (head * a.queries + row) * a.width;
    weights[r] = scores[r] = scratch.data() + r * room;
    later[r] = new_scores[r] = scores[r] + before;
    seen[r] = a.prefix_mask + token * a.slots + a.first;
    new_seen[r] = a.mask + token * a.tokens;
  }
  score<R>(a, q, a.prefix_k + head * a.width * a.slots + a.first, a.slots, seen, before, scores);
  score<R>(a, q, a.k + head * a.width * a.tokens, a.tokens, new_seen, a.tokens, new_scores);
  for (int r = 0; r < R; ++r) {
    float most = kUnseen;
    for (int64_t j = 0; j < all; ++j) most = std::max(most, scores[r][j]);
    for (int64_t j = all; j < room; ++j) scores[r][j] = kUnseen;
    for (int64_t j = 0; j < room; j += kLanes) {
      Floats x = Arithmetic<float>::load(scores[r] + j);
      Floats weight = exponential(x - most);
      weight = x == kUnseen ? Floats{} : weight;
      std::memcpy(scores[r] + j, &weight, sizeof(weight));
    }
  }
  const float* prefix_v = a.prefix_v + (head * a.slots + a.first) * a.width;
  const float* v = a.v + head * a.tokens * a.width;
  for (int64_t h = 0; h < a.width; h += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, a.width - h);
    Floats mixed[R] = {}, total[R] = {};
    mix<R>(prefix_v + h, a.width, before, n, weights, mixed, total);
    mix<R>(v + h, a.width, a.tokens, n, later, mixed, total);
    for (int r = 0; r < R; ++r) {
      Floats out = mixed[r] / total[r];
      std::memcpy(a.out + (head * a.queries + begin + r) * a.width + h, &out, n * sizeof(float));
    }
  }
}

void attend(const Attention& a, int64_t piece) {
  const int64_t tiles = (a.queries + kQueries - 1) / kQueries;
  const int64_t head = piece / tiles, begin = piece % tiles * kQueries;
  switch (std::min<int64_t>(kQueries, a.queries - begin)) {
    case 1: return queries<1>(a, head, begin);
    case 2: return queries<2>(a, head, begin);
    case 3: return queries<3>(a, head, begin);
    default: return queries<4>(a, head, begin);
  }
}

}  // namespace SPACE
}  // namespace

#endif
