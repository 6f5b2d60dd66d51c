// The kernels, compiled once an instruction set (see CMakeLists.txt). The slow obvious reference of each is
// in tests/native/.
#include "kernels.h"

#include "simd.h"

namespace llmb {
namespace LLMB_ISA {
namespace {

// ---- tiles of the matrix product
// -----------------------------------------------------------------------------
//
// acc[M][kChunkRows] += a[M rows of a panel] * w[NB blocks of 16 rows]. Every accumulation runs along k in
// one fixed order whatever M and NB are, so a token's result does not depend on what else is in its batch.

struct TileArgs {
  const uint8_t* w[kChunkBlocks];      // values at the first step
  const uint8_t* codes[kChunkBlocks];  // scale codes at the first group
  const uint8_t* a;                    // first row of the tile at the first step
  const float* scales;                 // of a, at the first group
  const int32_t* offsets;
  size_t stride;  // rows of the panel
  size_t count;   // steps, or groups for int8 and int4
};

template <Format F>
static inline VF dot(VF acc, VI w, VI a) {
  if constexpr (F == Format::kF32) return fma(as_float(w), as_float(a), acc);
  return dot_bf16(acc, w, a);
}

template <Format F, int M, int NB>
void tile_float(const TileArgs& t, float* __restrict acc) {
  constexpr int N = NB * kParts;
  const TileArgs local = t;
  VF c[M][N];
  LLMB_UNROLL for (int m = 0; m < M; ++m) LLMB_UNROLL for (int v = 0; v < N; ++v) {
    c[m][v] = load(acc + m * kChunkRows + v * kLanes);
  }
  const uint8_t* a = local.a;
  for (size_t s = 0; s < local.count; ++s, a += local.stride * 4) {
    VI w[N];
    LLMB_UNROLL for (int v = 0; v < N; ++v) {
      w[v] = load_bytes(local.w[v / kParts] + s * kStepBytes + v % kParts * kVectorBytes);
    }
    LLMB_UNROLL for (int m = 0; m < M; ++m) {
      const VI x = broadcast4(a + m * 4);
      LLMB_UNROLL for (int v = 0; v < N; ++v) c[m][v] = dot<F>(c[m][v], w[v], x);
    }
  }
  LLMB_UNROLL for (int m = 0; m < M; ++m) LLMB_UNROLL for (int v = 0; v < N; ++v) {
    store(acc + m * kChunkRows + v * kLanes, c[m][v]);
  }
}

// Steps that are unpacked together.
template <Format F>
constexpr int kBundle = F == Format::kInt4   ? 2
                        : F == Format::kInt6 ? 4
                                             : 1;

// The u8 values of kBundle<F> steps of one native vector; `at` points to the group's values, `s` is the first
// step.
template <Format F>
static inline void unpack_bundle(const uint8_t* at, int s, const Nibbles& codebook, VI* w) {
  if constexpr (F == Format::kInt8) {
    w[0] = load_bytes(at + s * kStepBytes);
  } else if constexpr (F == Format::kInt4) {
    const VI x = load_bytes(at + s / 2 * kStepBytes);
    w[0] = codebook.low(x);
    w[1] = codebook.high(x);
  } else {
    const VI a = load_bytes(at + s / 2 * kStepBytes), b = load_bytes(at + (s / 2 + 1) * kStepBytes);
    const VI pairs = load_bytes(at + (kGroupSteps / 2 + s / 4) * kStepBytes);
    w[0] = six_bits<0>(a, pairs);
    w[1] = six_bits<1>(a, pairs);
    w[2] = six_bits<2>(b, pairs);
    w[3] = six_bits<3>(b, pairs);
  }
}

// Group: columns that share a scale code, kGroup or half of it.
template <Format F, int Group, int M, int NB>
void tile_int(const TileArgs& t, float* __restrict acc) {
  constexpr int N = NB * kParts, B = kBundle<F>, kCodes = kGroup / Group;
  const Nibbles codebook(kInt4Codebook);
  const TileArgs local = t;
  const uint8_t* a = local.a;
  for (size_t g = 0; g < local.count; ++g) {
    const size_t values = g * step_bytes(F, kGroupSteps);
    for (int part = 0; part < kCodes; ++part) {
      VI c[M][N];
      LLMB_UNROLL for (int m = 0; m < M; ++m) {
        const int32_t* offset = local.offsets + 2 * g * local.stride + m;
        const VI start = !kUnsignedWeights ? iset1(0)
                         : kCodes == 2     ? iset1(offset[part * local.stride])
                                           : iset1(offset[0] + offset[local.stride]);
        LLMB_UNROLL for (int v = 0; v < N; ++v) c[m][v] = start;
      }
      for (int s = part * Group / 4; s < (part + 1) * Group / 4; s += B, a += B * local.stride * 4) {
        VI w[N][B];
        LLMB_UNROLL for (int v = 0; v < N; ++v) {
          unpack_bundle<F>(local.w[v / kParts] + values + v % kParts * kVectorBytes, s, codebook, w[v]);
        }
        LLMB_UNROLL for (int m = 0; m < M; ++m) LLMB_UNROLL for (int b = 0; b < B; ++b) {
          const VI x = broadcast4(a + (b * local.stride + m) * 4);
          LLMB_UNROLL for (int v = 0; v < N; ++v) c[m][v] = dot_int8(c[m][v], w[v][b], x);
        }
      }
      // The float sums stay in the first-level cache: with the integer ones they would not fit the registers.
      LLMB_UNROLL for (int v = 0; v < N; ++v) {
        const VF code =
            load_i8(local.codes[v / kParts] + (g * kCodes + part) * kBlockRows + v % kParts * kLanes);
        LLMB_UNROLL for (int m = 0; m < M; ++m) {
          const VF scale = mul(code, set1(local.scales[g * local.stride + m]));
          float* sum = acc + m * kChunkRows + v * kLanes;
          store(sum, fma(to_float(c[m][v]), scale, load(sum)));
        }
      }
    }
  }
}

template <Format F, int Group, int M, int NB>
inline void tile(const TileArgs& t, float* acc) {
  if constexpr (is_quantized(F))
    tile_int<F, Group, M, NB>(t, acc);
  else
    tile_float<F, M, NB>(t, acc);
}

template <Format F, int Group, int NB>
void tile_rows(const TileArgs& t, int rows, float* acc) {
  static_assert(kTileRows == 6 || kTileRows == 2);
  switch (rows) {
    case 1:
      return tile<F, Group, 1, NB>(t, acc);
    case 2:
      return tile<F, Group, 2, NB>(t, acc);
  }
  if constexpr (kTileRows > 2) {
    switch (rows) {
      case 3:
        return tile<F, Group, 3, NB>(t, acc);
      case 4:
        return tile<F, Group, 4, NB>(t, acc);
      case 5:
        return tile<F, Group, 5, NB>(t, acc);
      case 6:
        return tile<F, Group, 6, NB>(t, acc);
    }
  }
}

// Any number of rows of one panel times up to kChunkBlocks blocks.
template <Format F, int Group = group_cols(F)>
void panel(TileArgs t, int rows, int blocks, float* acc) {
  // Four unpacked steps of six bits leave no registers for more.
  constexpr int kBlocks = F == Format::kInt6 ? 1 : kTileBlocks;
  const uint8_t* const a = t.a;
  const float* const scales = t.scales;
  const int32_t* const offsets = t.offsets;
  const int tiles = (rows + kTileRows - 1) / kTileRows, tile_height = (rows + tiles - 1) / tiles;
  for (int b = 0; b < blocks;) {
    const int nb = blocks - b >= kBlocks ? kBlocks : 1;
    for (int m = 0; m < rows; m += tile_height) {
      const int n = rows - m < tile_height ? rows - m : tile_height;
      t.a = a + m * 4;
      t.scales = scales ? scales + m : nullptr;
      t.offsets = offsets ? offsets + m : nullptr;
      float* out = acc + m * kChunkRows + b * kBlockRows;
      if (nb == kBlocks)
        tile_rows<F, Group, kBlocks>(t, n, out);
      else
        tile_rows<F, Group, 1>(t, n, out);
    }
    for (int i = 0; i + nb < kChunkBlocks; ++i) {
      t.w[i] = t.w[i + nb];
      t.codes[i] = t.codes[i + nb];
    }
    b += nb;
  }
}

// With `expanded`, the values are those of int8; the scale codes stay those of f.
void panel_of(Format f, bool expanded, const TileArgs& t, int rows, int blocks, float* acc) {
  switch (f) {
    case Format::kF32:
      return panel<Format::kF32>(t, rows, blocks, acc);
    case Format::kBF16:
      return panel<Format::kBF16>(t, rows, blocks, acc);
    case Format::kInt8:
      return panel<Format::kInt8>(t, rows, blocks, acc);
    case Format::kInt4:
      return expanded ? panel<Format::kInt8, group_cols(Format::kInt4)>(t, rows, blocks, acc)
                      : panel<Format::kInt4>(t, rows, blocks, acc);
    case Format::kInt6:
      return expanded ? panel<Format::kInt8>(t, rows, blocks, acc)
                      : panel<Format::kInt6>(t, rows, blocks, acc);
  }
}

// ---- linear
// --------------------------------------------------------------------------------------------------

// Steps of int4 or int6 become steps of int8: for a batch it is cheaper to unpack each once.
template <Format F>
void expand(const uint8_t* in, size_t num_steps, uint8_t* out) {
  const Nibbles codebook(kInt4Codebook);
  for (size_t g = 0; g < num_steps; g += kGroupSteps)
    for (int p = 0; p < kParts; ++p)
      for (int s = 0; s < kGroupSteps; s += kBundle<F>) {
        VI w[kBundle<F>];
        unpack_bundle<F>(in + step_bytes(F, g) + p * kVectorBytes, s, codebook, w);
        for (int b = 0; b < kBundle<F>; ++b)
          store_bytes(out + (g + s + b) * kStepBytes + p * kVectorBytes, w[b]);
      }
}

// One row's 16 sums of a block, scaled and with the bias.
struct Finish {
  const LinearArgs& args;
  size_t block_stride;

  void block(const float* acc, size_t block, VF out[kParts]) const {
    const uint8_t* data = args.weight.data + block * block_stride;
    for (int p = 0; p < kParts; ++p) {
      VF v = load(acc + p * kLanes);
      if (is_quantized(args.weight.format))
        v = mul(v, load(reinterpret_cast<const float*>(data) + p * kLanes));
      if (args.bias) v = add(v, load(args.bias + block * kBlockRows + p * kLanes));
      out[p] = v;
    }
  }
};

// Writes 16 values to out[col...], fewer where the matrix ends.
void write_block(const VF v[kParts], float* out, size_t col, size_t cols, bool accumulate) {
  if (col + kBlockRows <= cols) {
    for (int p = 0; p < kParts; ++p) {
      float* to = out + col + p * kLanes;
      store(to, accumulate ? add(load(to), v[p]) : v[p]);
    }
    return;
  }
  float last[kBlockRows];
  for (int p = 0; p < kParts; ++p) store(last + p * kLanes, v[p]);
  for (size_t i = 0; col + i < cols; ++i) out[col + i] = accumulate ? out[col + i] + last[i] : last[i];
}

void finish_rows(const LinearArgs& args, size_t row, size_t rows, size_t block, size_t blocks,
                 const float* acc) {
  const Finish finish{args, block_bytes(args.weight.format, args.weight.cols)};
  for (size_t r = 0; r < rows; ++r, acc += kChunkRows) {
    float* out = args.out + (row + r) * args.out_stride;
    VF v[kParts];
    if (args.epilogue == Epilogue::kSiluMul) {
      for (size_t b = 0; b + 1 < blocks; b += 2) {
        VF up[kParts];
        finish.block(acc + b * kBlockRows, block + b, v);
        finish.block(acc + (b + 1) * kBlockRows, block + b + 1, up);
        for (int p = 0; p < kParts; ++p) v[p] = mul(silu(v[p]), up[p]);
        write_block(v, out, (block + b) / 2 * kBlockRows, args.out_cols, false);
      }
    } else {
      for (size_t b = 0; b < blocks; ++b) {
        finish.block(acc + b * kBlockRows, block + b, v);
        write_block(v, out, (block + b) * kBlockRows, args.out_cols, args.epilogue == Epilogue::kAdd);
      }
    }
  }
}

void linear(const LinearArgs& args, size_t block, size_t num_blocks, const Scratch& scratch) {
  const Weight& weight = args.weight;
  const Activations& in = args.input;
  const Format f = weight.format;
  const size_t stride = block_bytes(f, weight.cols), header = header_bytes(f, weight.cols);
  const bool quantized = is_quantized(f);
  const size_t per_count = quantized ? kGroupSteps : 1;  // steps in what TileArgs::count counts
  const bool one_panel = args.num_tokens <= kPanelRows;
  const bool expanded = !one_panel && (f == Format::kInt4 || f == Format::kInt6);
  const size_t pass = one_panel ? in.num_steps : kStepsPerPass;

  std::memset(scratch.accumulators, 0, args.num_tokens * kChunkRows * sizeof(float));
  for (size_t s0 = 0; s0 < in.num_steps; s0 += pass) {
    const size_t n = in.num_steps - s0 < pass ? in.num_steps - s0 : pass;
    TileArgs t{};
    t.count = n / per_count;
    for (size_t b = 0; b < num_blocks; ++b) {
      const uint8_t* data = weight.data + (block + b) * stride;
      t.codes[b] = data + 64 + s0 * 4 / group_cols(f) * kBlockRows;
      t.w[b] = data + header + step_bytes(f, s0);
      if (expanded) {
        uint8_t* to = scratch.expanded + b * kStepsPerPass * kStepBytes;
        f == Format::kInt4 ? expand<Format::kInt4>(t.w[b], n, to) : expand<Format::kInt6>(t.w[b], n, to);
        t.w[b] = to;
      }
    }
    for (size_t row = 0; row < args.num_tokens; row += kPanelRows) {
      const size_t rows = args.num_tokens - row < kPanelRows ? args.num_tokens - row : kPanelRows;
      t.stride = rows;
      t.a = in.values + (row * in.num_steps + s0 * rows) * 4;
      if (quantized) {
        const size_t at = row * in.num_groups + s0 / kGroupSteps * rows;
        t.scales = in.scales + at;
        t.offsets = in.offsets + 2 * at;
      }
      panel_of(f, expanded, t, static_cast<int>(rows), static_cast<int>(num_blocks),
               scratch.accumulators + row * kChunkRows);
    }
  }
  finish_rows(args, 0, args.num_tokens, block, num_blocks, scratch.accumulators);
}

// ---- activations
// ---------------------------------------------------------------------------------------------

constexpr size_t kSlice = 64;  // columns that are normalised and converted at a time
static_assert(kSlice == kGroup);

// y = x * r * norm for up to kSlice columns, zero beyond.
void normalise(const float* x, const float* norm, float r, size_t n, float* y) {
  if (n == kSlice) {
    for (size_t i = 0; i < kSlice; i += kLanes) {
      const VF v = load(x + i);
      store(y + i, norm ? mul(mul(v, set1(r)), load(norm + i)) : v);
    }
    return;
  }
  for (size_t i = 0; i < kSlice; ++i) y[i] = i >= n ? 0.0f : norm ? x[i] * r * norm[i] : x[i];
}

// One group, rotated, as int8 with its scale; sums[h] is the sum of half h.
void quantize_group(const float* y, int8_t* q, float* scale, int32_t sums[2]) {
  constexpr int N = kGroup / kLanes;
  VF v[N];
  LLMB_UNROLL for (int i = 0; i < N; ++i) v[i] = load(y + i * kLanes);
  hadamard(v);
  VF peak = vabs(v[0]);
  LLMB_UNROLL for (int i = 1; i < N; ++i) peak = vmax(peak, vabs(v[i]));
  const float amax = reduce_max(peak);
  const bool zero = !(amax > 1e-30f);  // all zero, or not a number
  *scale = zero ? 0.0f : amax / 127.0f;
  const VF inverse = set1(zero ? 0.0f : 127.0f / amax);
  VI sum[2] = {iset1(0), iset1(0)};
  LLMB_UNROLL for (int i = 0; i < N; ++i) {
    const VI rounded = round_to_int(mul(v[i], inverse));
    sum[2 * i / N] = iadd(sum[2 * i / N], rounded);
    store_i8(q + i * kLanes, rounded);
  }
  sums[0] = reduce_iadd(sum[0]);
  sums[1] = reduce_iadd(sum[1]);
}

void activate(const float* const* x, size_t num_rows, const float* norm, float eps, const Activations& out,
              size_t row) {
  uint8_t* values = out.values + row * out.num_steps * 4;
  float* scales = out.scales + row * out.num_groups;
  int32_t* offsets = out.offsets + 2 * row * out.num_groups;
  for (size_t m = 0; m < num_rows; ++m) {
    const float r =
        norm ? 1.0f / std::sqrt(sum_of_squares(x[m], out.cols) / static_cast<float>(out.cols) + eps) : 1.0f;
    for (size_t k = 0; k < out.cols; k += kSlice) {
      const size_t n = out.cols - k < kSlice ? out.cols - k : kSlice;
      alignas(64) float y[kSlice];
      normalise(x[m] + k, norm ? norm + k : nullptr, r, n, y);
      if (out.format == Format::kInt8) {
        alignas(64) int8_t q[kGroup];
        const size_t g = k / kGroup;
        int32_t sums[2];
        quantize_group(y, q, &scales[g * num_rows + m], sums);
        for (size_t h = 0; h < 2; ++h) offsets[(2 * g + h) * num_rows + m] = -128 * sums[h];
        for (size_t s = 0; s < kGroupSteps; ++s)
          std::memcpy(values + ((g * kGroupSteps + s) * num_rows + m) * 4, q + s * 4, 4);
      } else if (out.format == Format::kBF16) {
        uint16_t half[kSlice];
        for (size_t i = 0; i < kSlice; ++i) half[i] = bf16_from_float(y[i]);
        for (size_t i = 0; i < n; i += 2) std::memcpy(values + ((k + i) / 2 * num_rows + m) * 4, half + i, 4);
      } else {
        for (size_t i = 0; i < n; ++i) std::memcpy(values + ((k + i) * num_rows + m) * 4, y + i, 4);
      }
    }
  }
}

void widen(const uint16_t* in, float* out, size_t n) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load_bf16(in + i));
  for (; i < n; ++i) out[i] = float_from_bf16(in[i]);
}

}  // namespace
}  // namespace LLMB_ISA

#define LLMB_CONCAT2(a, b) a##b
#define LLMB_CONCAT(a, b) LLMB_CONCAT2(a, b)
#define LLMB_STRING2(a) #a
#define LLMB_STRING(a) LLMB_STRING2(a)

const Kernels& LLMB_CONCAT(LLMB_ISA, _kernels)() {
  using namespace LLMB_ISA;
  static const Kernels kernels{LLMB_STRING(LLMB_ISA), activate, linear, attention_kernels, widen};
  return kernels;
}

}  // namespace llmb
