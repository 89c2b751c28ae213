// The kernels against plain loops, on threads of this program's own, so that sanitizers see all of it:
//   c++ -std=c++17 -O1 -g -fsanitize=address,undefined -isystem $(jax's headers) tests/native_check.cc -o check && ./check

#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <thread>
#include <condition_variable>

#include "../specjax/ops/native.cc"

namespace {

// As XLA's pool is used: tasks that may run late.
class Pool {
 public:
  explicit Pool(int threads) : count_(threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return count_; }
  template <class F>
  void Schedule(F&& task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push(std::forward<F>(task));
    }
    wake_.notify_one();
  }

 private:
  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return ended_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto task = std::move(tasks_.front());
      tasks_.pop();
      lock.unlock();
      task();
    }
  }
  int count_;
  bool ended_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::queue<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
};

std::mt19937 generator(0);

float drawn() { return std::uniform_real_distribution<float>(-1, 1)(generator); }
float value(float x) { return x; }
float value(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
template <class W>
W made();
template <>
float made<float>() { return drawn(); }
template <>
bf16 made<bf16>() {
  float x = drawn();
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<bf16>(bits >> 16);
}

int failures = 0;

template <class T>
std::unique_ptr<T[]> exactly(size_t n) { return std::unique_ptr<T[]>(new T[n]); }  // nothing beyond its end

template <class W>
void product(Pool& pool, Kernel rows, int64_t t, int64_t o, int64_t i) {
  auto x = exactly<W>(t * i), w = exactly<W>(o * i);
  auto y = exactly<float>(t * o);
  for (int64_t n = 0; n < t * i; ++n) x[n] = made<W>();
  for (int64_t n = 0; n < o * i; ++n) w[n] = made<W>();
  Product p{x.get(), w.get(), y.get(), t, o, i};
  int64_t size = 7, pieces = (o + size - 1) / size;
  Shared::run(pool, pieces, [&](int64_t n) { rows(p, n * size, std::min(o, (n + 1) * size)); });
  for (int64_t a = 0; a < t; ++a)
    for (int64_t b = 0; b < o; ++b) {
      double total = 0;
      for (int64_t n = 0; n < i; ++n) total += static_cast<double>(value(x[a * i + n])) * value(w[b * i + n]);
      if (!(std::abs(total - y[a * o + b]) < 1e-4 * (1 + i))) ++failures;
    }
}

void attention(Pool& pool, int64_t heads, int64_t groups, int64_t tokens, int64_t width, int64_t slots, int64_t first, int64_t end) {
  int64_t queries = groups * tokens;
  auto q = exactly<float>(heads * queries * width), k = exactly<float>(heads * width * tokens),
       v = exactly<float>(heads * tokens * width), pk = exactly<float>(heads * width * slots),
       pv = exactly<float>(heads * slots * width), out = exactly<float>(heads * queries * width);
  auto mask = exactly<bool>(tokens * tokens), pm = exactly<bool>(tokens * slots);
  for (int64_t n = 0; n < heads * queries * width; ++n) q[n] = 3 * drawn();
  for (int64_t n = 0; n < heads * width * tokens; ++n) k[n] = drawn(), v[n] = drawn();
  for (int64_t n = 0; n < heads * width * slots; ++n) pk[n] = drawn(), pv[n] = drawn();
  for (int64_t a = 0; a < tokens; ++a) {
    for (int64_t b = 0; b < tokens; ++b) mask[a * tokens + b] = a == b || (b < a && drawn() > 0);
    for (int64_t s = 0; s < slots; ++s) pm[a * slots + s] = s >= first && s < end && drawn() > -0.5f;
  }
  Attention a{q.get(), k.get(), v.get(), pk.get(), pv.get(), mask.get(), pm.get(), out.get(),
              heads, queries, tokens, width, slots, first, end};
  int64_t tiles = (queries + kQueries - 1) / kQueries;
  Shared::run(pool, heads * tiles, [&](int64_t piece) { kernels().attention(a, piece); });
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t r = 0; r < queries; ++r) {
      int64_t token = r % tokens;
      std::vector<double> mixed(width);
      double total = 0;
      auto take = [&](auto key, auto given) {
        double score = 0;
        for (int64_t d = 0; d < width; ++d) score += static_cast<double>(q[(h * queries + r) * width + d]) * key(d);
        total += std::exp(score);
        for (int64_t d = 0; d < width; ++d) mixed[d] += std::exp(score) * given(d);
      };
      for (int64_t s = first; s < end; ++s)
        if (pm[token * slots + s])
          take([&](int64_t d) { return pk[(h * width + d) * slots + s]; }, [&](int64_t d) { return pv[(h * slots + s) * width + d]; });
      for (int64_t n = 0; n < tokens; ++n)
        if (mask[token * tokens + n])
          take([&](int64_t d) { return k[(h * width + d) * tokens + n]; }, [&](int64_t d) { return v[(h * tokens + n) * width + d]; });
      for (int64_t d = 0; d < width; ++d)
        if (!(std::abs(mixed[d] / total - out[(h * queries + r) * width + d]) < 1e-4)) ++failures;
    }
}

}  // namespace

int main() {
  if (!SpecjaxServes()) return std::puts("no kernel for this CPU"), 0;
  Pool pool(4);
  for (int64_t t = 1; t <= 32; ++t)
    for (auto [o, i] : {std::pair<int64_t, int64_t>{1, 1}, {5, 17}, {29, 70}, {50, 65}}) {
      product<float>(pool, kernels().in_f32, t, o, i);
      product<bf16>(pool, kernels().in_bf16, t, o, i);
    }
  for (int64_t tokens : {1, 2, 3, 8, 17, 32})
    for (int64_t width : {1, 6, 16, 33, 64}) {
      attention(pool, 2, 3, tokens, width, 70, 0, 0);
      attention(pool, 1, 1, tokens, width, 70, 3, 70);
      attention(pool, 3, 2, tokens, width, 33, 0, 20);
    }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
