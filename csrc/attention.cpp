// Rotary embedding, the cache of keys and values, and attention, compiled once an instruction set. Each row
// of queries folds tiles of kKeyTile positions in order, whatever its batch, chunk or thread.
#include "attention.h"

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace llmb {
namespace LLMB_ISA {
namespace {

constexpr size_t kMaxHeadDim = 256;
constexpr size_t kRuns = kKeyTile / kRun;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNone = -1e30f;  // below every score
alignas(64) constexpr float kOnes[kRun] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

template <CacheFormat F>
constexpr bool kIsFloat = F == CacheFormat::kF32;
template <CacheFormat F>
constexpr size_t kLaneBytes = lane_values(F) * value_bytes(F);
template <CacheFormat F>
constexpr float kLargest = F == CacheFormat::kInt8 ? 127.0f : 32767.0f;
// Keys of int16 leave the queries 17 bits: sum |q| <= 131,028 keeps a dot within int32.
template <CacheFormat F>
constexpr float kLargestKey = F == CacheFormat::kInt8 ? 127.0f : 16383.0f;
constexpr float kSumOfQueries = 130900.0f;  // and half a unit of rounding each
constexpr float kSumOfWeights = 65000.0f;   // the same for weights beside values of int16

// What multiplies cached values: floats beside floats, else int16.
template <CacheFormat F>
using Factor = std::conditional_t<kIsFloat<F>, float, int16_t>;

// ---- vectors of a head

void normalise(float* x, const float* weight, float eps, size_t n) {
  const float r = 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
  for (size_t i = 0; i < n; ++i) x[i] = x[i] * r * weight[i];
}

// In halves (Hugging Face's order of a head's dimensions).
void rotate(float* x, const float* cos, const float* sin, size_t half) {
  for (size_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

template <size_t N>
void transform_pieces(float* x, size_t dim) {
  for (size_t d = 0; d < dim; d += N) {
    VF v[N / kLanes];
    LLMB_UNROLL for (size_t i = 0; i < N / kLanes; ++i) v[i] = load(x + d + i * kLanes);
    hadamard(v);
    LLMB_UNROLL for (size_t i = 0; i < N / kLanes; ++i) store(x + d + i * kLanes, v[i]);
  }
}

// x = H x in pieces of 64 or 16; returns the piece: H H = piece.
size_t transform(float* x, size_t dim) {
  if (dim % 64 == 0) return transform_pieces<64>(x, dim), 64;
  return transform_pieces<16>(x, dim), 16;
}

struct Size {
  float max, sum;  // of magnitudes; not a number where an element is not
};

Size size_of(const float* x, size_t n) {
  VF max = set1(0.0f), sum = set1(0.0f), zero = set1(0.0f);
  for (size_t i = 0; i < n; i += kLanes) {
    const VF v = load(x + i);
    max = vmax(max, vabs(v));
    sum = add(sum, vabs(v));
    zero = fma(v, set1(0.0f), zero);
  }
  const float nan = reduce_add(zero);
  return {reduce_max(max) + nan, reduce_add(sum) + nan};
}

// q = x / unit, of which the caller knows 1 / unit.
template <typename T>
void divide(const float* x, size_t n, float inverse, T* q) {
  for (size_t i = 0; i < n; i += kLanes) {
    const VI rounded = round_to_int(mul(load(x + i), set1(inverse)));
    if constexpr (sizeof(T) == 1)
      store_i8(q + i, rounded);
    else
      store_i16(q + i, rounded);
  }
}

// x as integers up to `largest`; returns their unit.
template <typename T>
float quantize(const float* x, size_t n, float largest, T* q) {
  const float max = size_of(x, n).max;
  divide(x, n, max > 1e-30f ? largest / max : 0.0f, q);
  return max / largest;
}

// ---- keys and values into the cache

// One token's key or value of a head, as cached values, with its unit.
template <CacheFormat F>
struct Cached {
  using T =
      std::conditional_t<kIsFloat<F>, float, std::conditional_t<F == CacheFormat::kInt8, int8_t, int16_t>>;
  alignas(64) T values[kMaxHeadDim];
  float unit = 1.0f;

  Cached(float* x, size_t dim, float largest) {
    if constexpr (kIsFloat<F>) {
      std::memcpy(values, x, dim * sizeof(float));
    } else {
      if constexpr (F == CacheFormat::kInt8) transform(x, dim);
      unit = quantize(x, dim, largest, values);
    }
  }
};

template <CacheFormat F>
void store_token(const HeadsArgs& args, size_t token, size_t kv_head) {
  const auto [heads, kv_heads, dim] = args.shape;
  const CacheLayer& cache = args.cache;
  const size_t position = args.first_position + token, offset = position % cache.block_size;
  const size_t at = cache.at(args.block_table[position / cache.block_size], kv_head);
  const float* row = args.qkv + token * args.qkv_stride;
  alignas(64) float x[kMaxHeadDim];

  std::memcpy(x, row + (heads + kv_head) * dim, dim * sizeof(float));
  if (args.k_norm) normalise(x, args.k_norm, args.eps, dim);
  rotate(x, args.cos + token * (dim / 2), args.sin + token * (dim / 2), dim / 2);
  if (!kIsFloat<F> && args.k_centre)
    for (size_t d = 0; d < dim; ++d) x[d] -= args.k_centre[kv_head * dim + d];
  const Cached<F> key(x, dim, kLargestKey<F>);
  std::memcpy(x, row + (heads + kv_heads + kv_head) * dim, dim * sizeof(float));
  const Cached<F> value(x, dim, kLargest<F>);

  constexpr size_t e = lane_values(F), lane = kLaneBytes<F>;
  uint8_t* keys = cache.keys + at + offset / kRun * (kRun * dim * value_bytes(F)) + offset % kRun * lane;
  for (size_t d = 0; d < dim; d += e) std::memcpy(keys + d / e * (kRun * lane), key.values + d, lane);
  uint8_t* values = cache.values + at + offset / e * (16 * lane) + offset % e * value_bytes(F);
  const size_t dims_stride = cache.block_size * 16 * value_bytes(F);  // from 16 dimensions to the next 16
  for (size_t d = 0; d < dim; ++d)
    std::memcpy(values + d / 16 * dims_stride + d % 16 * lane, value.values + d, value_bytes(F));
  if constexpr (!kIsFloat<F>) {
    const size_t scales = at + cache.block_size * dim * value_bytes(F) + offset * 4;
    std::memcpy(cache.keys + scales, &key.unit, 4);
    std::memcpy(cache.values + scales, &value.unit, 4);
  }
}

void store_kv(const HeadsArgs& args, size_t token, size_t kv_head) {
  switch (args.cache.format) {
    case CacheFormat::kF32:
      return store_token<CacheFormat::kF32>(args, token, kv_head);
    case CacheFormat::kInt16:
      return store_token<CacheFormat::kInt16>(args, token, kv_head);
    case CacheFormat::kInt8:
      return store_token<CacheFormat::kInt8>(args, token, kv_head);
  }
}

// ---- products with a tile of the cache

template <CacheFormat F>
static inline VI load_lanes(const uint8_t* p) {
  if constexpr (F == CacheFormat::kInt8) return load_i8_pairs(p);
  return load_bytes(p);
}
template <CacheFormat F>
static inline auto no_sum() {
  if constexpr (kIsFloat<F>)
    return set1(0.0f);
  else
    return iset1(0);
}
static inline VF multiply_add(VF acc, VI w, VI a) { return fma(as_float(w), as_float(a), acc); }
static inline VI multiply_add(VI acc, VI w, VI a) { return dot_int16(acc, w, a); }
static inline VF as_sum(VF a) { return a; }
static inline VF as_sum(VI a) { return to_float(a); }

// done(m, v, a[m] * w[v]) for M rows and NB columns of 16 lanes. The cached operand lies in pieces:
// at(column, piece) points to up to `piece_steps` steps, `steps` in all; what ahead(column, piece) points to
// is read next: blocks lie anywhere, which no processor foresees.
template <CacheFormat F, int M, int NB, typename At, typename Ahead, typename Done>
static inline void multiply(const Factor<F>* a, size_t stride, size_t steps, size_t piece_steps, const At& at,
                            const Ahead& ahead, const Done& done) {
  constexpr int N = NB * kParts;
  decltype(no_sum<F>()) c[M][N];
  LLMB_UNROLL for (int m = 0; m < M; ++m) LLMB_UNROLL for (int v = 0; v < N; ++v) c[m][v] = no_sum<F>();
  const uint8_t* x = reinterpret_cast<const uint8_t*>(a);
  for (size_t piece = 0; piece * piece_steps < steps; ++piece) {
    const size_t left = steps - piece * piece_steps, n = left < piece_steps ? left : piece_steps;
    const uint8_t *w[NB], *next[NB];
    LLMB_UNROLL for (int b = 0; b < NB; ++b) {
      w[b] = at(b, piece);
      next[b] = ahead(b, piece);
    }
    for (size_t s = 0; s < n; ++s, x += 4) {
      VI y[N];
      LLMB_UNROLL for (int b = 0; b < NB; ++b) __builtin_prefetch(next[b] + s * 16 * kLaneBytes<F>, 0, 2);
      LLMB_UNROLL for (int v = 0; v < N; ++v) {
        y[v] = load_lanes<F>(w[v / kParts] + (s * 16 + v % kParts * kLanes) * kLaneBytes<F>);
      }
      LLMB_UNROLL for (int m = 0; m < M; ++m) {
        const VI z = broadcast4(x + m * stride * sizeof(Factor<F>));
        LLMB_UNROLL for (int v = 0; v < N; ++v) c[m][v] = multiply_add(c[m][v], y[v], z);
      }
    }
  }
  LLMB_UNROLL for (int m = 0; m < M; ++m) LLMB_UNROLL for (int v = 0; v < N; ++v) done(m, v, as_sum(c[m][v]));
}

template <CacheFormat F, int NB, typename... Args>
void multiply_rows(size_t rows, const Args&... args) {
  switch (rows) {
    case 1:
      return multiply<F, 1, NB>(args...);
    case 2:
      return multiply<F, 2, NB>(args...);
  }
  if constexpr (kTileRows > 2) {
    switch (rows) {
      case 3:
        return multiply<F, 3, NB>(args...);
      case 4:
        return multiply<F, 4, NB>(args...);
      case 5:
        return multiply<F, 5, NB>(args...);
      case 6:
        return multiply<F, 6, NB>(args...);
    }
  }
}

// `columns` of 16 lanes, kTileBlocks at a time; done(row, lane, sums of kLanes lanes).
template <CacheFormat F, typename At, typename Ahead, typename Done>
void multiply_columns(size_t rows, size_t columns, const Factor<F>* a, size_t stride, size_t steps,
                      size_t piece_steps, const At& at, const Ahead& ahead, const Done& done) {
  for (size_t c = 0; c < columns;) {
    const auto from = [&](int b, size_t piece) { return at(c + b, piece); };
    const auto next = [&](int b, size_t piece) { return ahead(c + b, piece); };
    const auto to = [&](int m, int v, VF sums) { done(m, c * 16 + v * kLanes, sums); };
    if (columns - c >= kTileBlocks) {
      multiply_rows<F, kTileBlocks>(rows, a, stride, steps, piece_steps, from, next, to);
      c += kTileBlocks;
    } else {
      multiply_rows<F, 1>(rows, a, stride, steps, piece_steps, from, next, to);
      c += 1;
    }
  }
}

// ---- attention

// Where a tile's keys and values are: a pointer for each run of 16 positions.
template <CacheFormat F>
struct Tile {
  size_t start, positions;
  const uint8_t* keys[kRuns];
  const uint8_t* values[kRuns];
  const float* key_units[kRuns];
  const float* value_units[kRuns];
  float largest_value_unit;  // of the whole tile; only where it is full

  Tile(const AttentionArgs& args, size_t index, size_t end) {
    move_to(args, index, end);
    for (size_t i = (positions + kRun - 1) / kRun; i < kRuns; ++i) {
      keys[i] = keys[0];
      values[i] = values[0];
    }
  }

  // Runs beyond the end keep what they had: something to read ahead.
  void move_to(const AttentionArgs& args, size_t index, size_t end) {
    start = index * kKeyTile;
    positions = end - start < kKeyTile ? end - start : kKeyTile;
    const CacheLayer& cache = args.cache;
    for (size_t i = 0; i * kRun < positions; ++i) {
      const size_t position = start + i * kRun, offset = position % cache.block_size;
      const size_t at = cache.at(args.block_table[position / cache.block_size], args.kv_head);
      keys[i] = cache.keys + at + offset * cache.head_dim * value_bytes(F);
      values[i] = cache.values + at + offset * 16 * value_bytes(F);
      const size_t units = at + cache.block_size * cache.head_dim * value_bytes(F) + offset * 4;
      key_units[i] = kIsFloat<F> ? kOnes : reinterpret_cast<const float*>(cache.keys + units);
      value_units[i] = kIsFloat<F> ? kOnes : reinterpret_cast<const float*>(cache.values + units);
    }
    largest_value_unit = positions == kKeyTile ? largest_unit(kKeyTile) : 0.0f;
  }

  // Of the first `valid` positions; what lies beyond may be a former owner's.
  float largest_unit(size_t valid) const {
    VF max = set1(0.0f);
    size_t j = 0;
    for (; j + kLanes <= valid; j += kLanes) max = vmax(max, load(value_units[j / kRun] + j % kRun));
    float result = reduce_max(max);
    for (; j < valid; ++j)
      if (const float x = value_units[j / kRun][j % kRun]; x > result) result = x;
    return result;
  }
};

template <CacheFormat F>
class Rows {
 public:
  explicit Rows(const AttentionArgs& args)
      : args_(args), dim_(args.shape.head_dim), group_(args.shape.heads / args.shape.kv_heads) {
    rows_ = args.row_end - args.row_begin;
    for (size_t r = 0; r < rows_; ++r) limit_[r] = args.first_position + token(r) + 1;
  }

  void run() {
    const size_t panels = (rows_ + kTileRows - 1) / kTileRows, height = (rows_ + panels - 1) / panels;
    for (size_t r = 0; r < rows_; ++r) prepare(r);
    if (!args_.partial.max) clear();
    const size_t seen = limit_[rows_ - 1];
    Tile<F> tile(args_, args_.tile_begin, seen), next = tile;
    for (size_t t = args_.tile_begin; t < args_.tile_end; ++t, tile = next) {
      if (t + 1 < args_.tile_end) next.move_to(args_, t + 1, seen);
      for (size_t r = 0; r < rows_; r += height)
        panel(tile, next, t, r, rows_ - r < height ? rows_ : r + height);
    }
    if (!args_.partial.max) finish();
  }

  void fold_partials() {
    clear();
    const Partial& partial = args_.partial;
    for (size_t t = 0, seen; t * kKeyTile < limit_[rows_ - 1]; ++t)
      for (size_t r = first_row(0, t * kKeyTile); r < rows_; r = seen) {
        seen = r + kPanel < rows_ ? r + kPanel : rows_;
        std::memcpy(tops_, partial.max + t * rows_ + r, (seen - r) * sizeof(float));
        std::memcpy(sums_, partial.sum + t * rows_ + r, (seen - r) * sizeof(float));
        fold(r, seen - r);
        const float* from = partial.values + (t * rows_ + r) * dim_;
        for (size_t m = 0; m < seen - r; ++m)
          for (size_t d = 0; d < dim_; d += kLanes) fold_values(r + m, m, d, load(from + m * dim_ + d));
      }
    finish();
  }

 private:
  size_t token(size_t r) const { return (args_.row_begin + r) / group_; }
  size_t head(size_t r) const { return args_.kv_head * group_ + (args_.row_begin + r) % group_; }

  // The first row from r on that sees a position beyond `start`.
  size_t first_row(size_t r, size_t start) const {
    while (r < rows_ && limit_[r] <= start) ++r;
    return r;
  }

  void clear() {
    std::memset(out_, 0, rows_ * dim_ * sizeof(float));
    for (size_t r = 0; r < rows_; ++r) {
      running_max_[r] = kNone;
      running_sum_[r] = 0.0f;
    }
  }

  // The query, normalised, rotated and scaled so that the softmax is one of powers of two.
  void prepare(size_t r) {
    const size_t t = token(r);
    alignas(64) float x[kMaxHeadDim];
    std::memcpy(x, args_.qkv + t * args_.qkv_stride + head(r) * dim_, dim_ * sizeof(float));
    if (args_.q_norm) normalise(x, args_.q_norm, args_.eps, dim_);
    rotate(x, args_.cos + t * (dim_ / 2), args_.sin + t * (dim_ / 2), dim_ / 2);
    float factor = args_.scale * kLog2E;
    if constexpr (kIsFloat<F>) {
      for (size_t d = 0; d < dim_; ++d) q_[r * dim_ + d] = x[d] * factor;
      q_unit_[r] = 1.0f;
    } else {
      if constexpr (F == CacheFormat::kInt8) factor /= static_cast<float>(transform(x, dim_));
      const Size size = size_of(x, dim_);
      float inverse = size.max > 1e-20f ? 32767.0f / size.max : 0.0f;
      if (F == CacheFormat::kInt16 && inverse * size.sum > kSumOfQueries) inverse = kSumOfQueries / size.sum;
      divide(x, dim_, inverse, q_ + r * dim_);
      q_unit_[r] = (inverse > 0.0f ? 1.0f / inverse : 1.0f + size.max) * factor;  // a unit, or not a number
    }
  }

  // Rows [begin, end) see a tile, those of them that see any of it.
  void panel(const Tile<F>& tile, const Tile<F>& next, size_t t, size_t begin, size_t end) {
    begin = first_row(begin, tile.start);
    if (begin >= end) return;
    const size_t rows = end - begin;
    const size_t last = limit_[end - 1] - tile.start, seen = last < kKeyTile ? last : kKeyTile;
    const size_t runs = (seen + kRun - 1) / kRun;
    constexpr size_t e = lane_values(F);

    multiply_columns<F>(
        rows, runs, q_ + begin * dim_, dim_, dim_ / e, dim_ / e,
        [&](size_t run, size_t) { return tile.keys[run]; },
        [&](size_t run, size_t) { return next.keys[run]; },
        [&](size_t m, size_t position, VF sums) {
          const VF unit = load(tile.key_units[position / kRun] + position % kRun);
          store(scores_ + m * kKeyTile + position, mul(mul(sums, unit), set1(q_unit_[begin + m])));
        });
    softmax(tile, begin, rows, runs * kRun);

    const size_t steps = kIsFloat<F> ? seen : runs * kRun / e;
    const size_t dims_stride = args_.cache.block_size * 16 * value_bytes(F);
    const auto values = [&](size_t column, size_t run) { return tile.values[run] + column * dims_stride; };
    const auto ahead = [&](size_t column, size_t run) { return next.values[run] + column * dims_stride; };
    if (args_.partial.max) {
      const size_t at = t * rows_ + begin;
      std::memcpy(args_.partial.max + at, tops_, rows * sizeof(float));
      std::memcpy(args_.partial.sum + at, sums_, rows * sizeof(float));
      float* to = args_.partial.values + at * dim_;
      multiply_columns<F>(
          rows, dim_ / 16, weights_, kKeyTile, steps, kRun / e, values, ahead,
          [&](size_t m, size_t d, VF sums) { store(to + m * dim_ + d, mul(sums, set1(weight_unit_[m]))); });
    } else {
      fold(begin, rows);
      multiply_columns<F>(rows, dim_ / 16, weights_, kKeyTile, steps, kRun / e, values, ahead,
                          [&](size_t m, size_t d, VF sums) {
                            fold_values(begin + m, m, d, mul(sums, set1(weight_unit_[m])));
                          });
    }
  }

  // The scores of rows [begin, begin + rows) become weights 2^(score - top), zero where a row sees nothing.
  // Row by row in three passes, so that one row's sum over lanes waits beside another's.
  void softmax(const Tile<F>& tile, size_t begin, size_t rows, size_t width) {
    size_t seen[kTileRows];
    for (size_t m = 0; m < rows; ++m) {
      const size_t left = limit_[begin + m] - tile.start;
      seen[m] = left < kKeyTile ? left : kKeyTile;
      float* s = scores_ + m * kKeyTile;
      for (size_t j = seen[m]; j % kLanes; ++j) s[j] = kNone;
      tops_[m] = in_whole_tiles(seen[m], [&](size_t n) {
        VF max = set1(kNone);
        LLMB_UNROLL for (size_t j = 0; j < n; j += kLanes) max = vmax(max, load(s + j));
        return reduce_max(max);
      });
    }
    for (size_t m = 0; m < rows; ++m) {
      float* s = scores_ + m * kKeyTile;
      const VF top = set1(tops_[m]);
      sums_[m] = in_whole_tiles(seen[m], [&](size_t n) {
        VF sum = set1(0.0f);
        LLMB_UNROLL for (size_t j = 0; j < n; j += kLanes) {
          const VF p = vexp2<kIsFloat<F> ? 7 : 5>(sub(load(s + j), top));
          sum = add(sum, p);
          store(s + j, p);
        }
        return reduce_add(sum);
      });
    }
    for (size_t m = 0; m < rows; ++m) {
      put_weights(tile, m, seen[m]);
      std::memset(weights_ + m * kKeyTile + seen[m], 0, (width - seen[m]) * sizeof(Factor<F>));
    }
  }

  // work(n) for n positions in whole vectors; a full tile is known to the compiler.
  template <typename Work>
  static float in_whole_tiles(size_t n, const Work& work) {
    return n == kKeyTile ? work(kKeyTile) : work((n + kLanes - 1) / kLanes * kLanes);
  }

  void put_weights(const Tile<F>& tile, size_t m, size_t seen) {
    const float* p = scores_ + m * kKeyTile;
    Factor<F>* to = weights_ + m * kKeyTile;
    if constexpr (kIsFloat<F>) {
      weight_unit_[m] = 1.0f;
      std::memcpy(to, p, seen * sizeof(float));
    } else {  // the values' units go into the weights
      const float largest = seen == kKeyTile ? tile.largest_value_unit : tile.largest_unit(seen);
      float inverse = 32767.0f;
      if (F == CacheFormat::kInt16 && sums_[m] * inverse > kSumOfWeights) inverse = kSumOfWeights / sums_[m];
      weight_unit_[m] = largest / inverse;
      const VF factor = set1(largest > 1e-30f ? inverse / largest : 0.0f);
      const auto put = [&](size_t run) {
        LLMB_UNROLL for (size_t j = 0; j < kRun; j += kLanes) {
          const VF weight = mul(load(p + run * kRun + j), mul(load(tile.value_units[run] + j), factor));
          store_i16(to + run * kRun + j, round_to_int(weight));
        }
      };
      for (size_t run = 0; run * kRun < seen; ++run) put(run);
    }
  }

  // The running maxima and sums of rows [begin, begin + rows) take in a tile; what was before is worth
  // keep_[m], the tile take_[m].
  void fold(size_t begin, size_t rows) {
    std::memset(keep_, 0, sizeof keep_);
    std::memset(take_, 0, sizeof take_);
    for (size_t m = 0; m < rows; ++m) {
      const float before = running_max_[begin + m], top = tops_[m] > before ? tops_[m] : before;
      keep_[m] = before - top;
      take_[m] = tops_[m] - top;
      running_max_[begin + m] = top;
    }
    for (size_t m = 0; m < rows; m += kLanes) {
      store(keep_ + m, vexp2<7>(load(keep_ + m)));
      store(take_ + m, vexp2<7>(load(take_ + m)));
    }
    for (size_t m = 0; m < rows; ++m) {
      float& sum = running_sum_[begin + m];
      sum = sum * keep_[m] + sums_[m] * take_[m];
    }
  }

  void fold_values(size_t r, size_t m, size_t d, VF values) {
    float* o = out_ + r * dim_ + d;
    store(o, fma(values, set1(take_[m]), mul(load(o), set1(keep_[m]))));
  }

  void finish() {
    for (size_t r = 0; r < rows_; ++r) {
      float* o = out_ + r * dim_;
      float factor = 1.0f / running_sum_[r];
      if constexpr (F == CacheFormat::kInt8) factor /= static_cast<float>(transform(o, dim_));
      float* to = args_.out + token(r) * args_.out_stride + head(r) * dim_;
      for (size_t d = 0; d < dim_; ++d) to[d] = o[d] * factor;
    }
  }

  static constexpr size_t kPanel = 16;  // rows of a tile, in whole vectors
  const AttentionArgs& args_;
  const size_t dim_, group_;
  size_t rows_;
  size_t limit_[kAttentionRows];  // positions that a row may see
  float q_unit_[kAttentionRows], running_max_[kAttentionRows], running_sum_[kAttentionRows];
  alignas(64) float tops_[kPanel], sums_[kPanel], weight_unit_[kPanel];  // of the tile in hand
  alignas(64) float keep_[kPanel], take_[kPanel];
  alignas(64) Factor<F> q_[kAttentionRows * kMaxHeadDim];
  alignas(64) float scores_[kTileRows * kKeyTile];
  alignas(64) Factor<F> weights_[kTileRows * kKeyTile];
  alignas(64) float out_[kAttentionRows * kMaxHeadDim];
};

template <CacheFormat F>
void attend(const AttentionArgs& args, bool fold_only) {
  Rows<F> rows(args);
  if (fold_only)
    rows.fold_partials();
  else
    rows.run();
}

void attend(const AttentionArgs& args, bool fold_only) {
  switch (args.cache.format) {
    case CacheFormat::kF32:
      return attend<CacheFormat::kF32>(args, fold_only);
    case CacheFormat::kInt16:
      return attend<CacheFormat::kInt16>(args, fold_only);
    case CacheFormat::kInt8:
      return attend<CacheFormat::kInt8>(args, fold_only);
  }
}

void attention(const AttentionArgs& args) { attend(args, false); }
void fold_attention(const AttentionArgs& args) { attend(args, true); }

}  // namespace

const AttentionKernels attention_kernels{store_kv, attention, fold_attention};

}  // namespace LLMB_ISA
}  // namespace llmb
