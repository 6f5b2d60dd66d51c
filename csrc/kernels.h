// What the plan executor asks of an instruction set. Nothing here knows a vector register.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace llmb {

// Rows of activations are stored in panels of up to 6 tokens, so that a tile of the matrix product reads them
// in one stream: panel = [steps][rows of the panel][4 bytes], scales = [groups][rows], offsets = [2 *
// groups][rows].
constexpr size_t kPanelRows = 6;

// The right operand of a linear: T tokens of `cols` values, in the number format that the weights are
// multiplied in.
struct Activations {
  Format format = Format::kF32;  // kF32, kBF16 or kInt8
  size_t cols = 0;
  size_t num_steps = 0;
  size_t num_groups = 0;
  uint8_t* values = nullptr;  // panel at row r: values + r * num_steps * 4
  float* scales =
      nullptr;  // int8 only; panel at row r: scales + r * num_groups, offsets + r * 2 * num_groups
  int32_t* offsets =
      nullptr;  // int8 only; -128 * the sum of each half group's values: what makes u8 weights signed
};

struct Weight {
  Format format = Format::kF32;
  size_t rows = 0, cols = 0;
  const uint8_t* data = nullptr;  // layout.h
};

enum class Epilogue : int {
  kStore = 0,    // out[t][n] = y
  kAdd = 1,      // out[t][n] += y
  kSiluMul = 2,  // blocks alternate gate, up:  out[t][n] = silu(gate) * up
};

struct LinearArgs {
  Weight weight;
  Activations input;
  size_t num_tokens = 0;
  const float* bias = nullptr;  // [rows padded to a block], in the packed order of rows
  Epilogue epilogue = Epilogue::kStore;
  float* out = nullptr;
  size_t out_stride = 0;
  size_t out_cols = 0;  // columns of out that exist: rows, or rows / 2 for kSiluMul
};

// Scratch of one thread.
struct Scratch {
  float* accumulators = nullptr;  // [tokens padded to a panel][kChunkRows]
  uint8_t* expanded = nullptr;    // kExpandedBytes
};

constexpr int kChunkBlocks = 4;  // a unit of work of a linear: 64 rows
constexpr size_t kChunkRows = kChunkBlocks * kBlockRows;
constexpr size_t kStepsPerPass = 1024;  // k is cut so that a chunk's weights stay in the second-level cache
constexpr size_t kExpandedBytes = kChunkBlocks * kStepsPerPass * kStepBytes;

// Keys and values of one layer: blocks of `block_size` positions (a multiple of 16), each kv head apart.
//   key block:   [block_size / 16][head_dim][16 positions] f32 or f16
//   value block: [head_dim / 16][block_size / e][16 dims][e], e = 1 (f32) or 2 (bf16): a packed matrix of
//   dimensions
// Keys need float16's longer mantissa: Qwen2's carry a large bias, and as bfloat16 they cost it more than all
// its weights in int8 (benchmarks/DIARY.md, 2026-11-22).
struct CacheLayer {
  Format format = Format::kBF16;  // of the values: kF32 or kBF16
  uint8_t* keys = nullptr;        // [num_blocks][kv_heads][block_size * head_dim]
  uint8_t* values = nullptr;
  size_t block_size = 0, kv_heads = 0, head_dim = 0;
};

struct HeadShape {
  size_t heads = 0, kv_heads = 0, head_dim = 0;
};

// Rotates q and k of one token in place, k of kv head `h` and v go into the cache.
struct RopeArgs {
  HeadShape shape;
  float* qkv = nullptr;        // [heads + 2 * kv_heads][head_dim] of this token
  const float* cos = nullptr;  // [head_dim / 2]
  const float* sin = nullptr;
  const float* q_norm = nullptr;  // [head_dim] or null (Qwen3)
  const float* k_norm = nullptr;
  float eps = 0;
  CacheLayer cache;
  size_t block = 0, offset = 0;  // where this position lives
  bool is_last = false;          // of its sequence
};

constexpr size_t kAttentionRows =
    8;  // query rows (tokens x heads of a group) that share one pass over the keys

struct AttentionArgs {
  HeadShape shape;
  const float* qkv = nullptr;  // first token of the sequence in this batch
  size_t qkv_stride = 0;
  float* out = nullptr;  // [tokens][heads * head_dim], first token of the sequence
  size_t out_stride = 0;
  float scale = 0;
  CacheLayer cache;
  const int32_t* block_table = nullptr;
  size_t first_position = 0;  // position of the sequence's first token in this batch
  size_t kv_head = 0;
  size_t row_begin = 0,
         row_end = 0;  // query rows: token * group + head within the group; at most kAttentionRows
};

struct Kernels {
  const char* name;
  // Rows [0, num_rows) of x, optionally normalised (RMSNorm with weight), as activations from row `row` on
  // (the start of a panel).
  void (*activate)(const float* const* x, size_t num_rows, const float* norm_weight, float eps,
                   const Activations& out, size_t row);
  // Blocks [block, block + num_blocks) of the weight times every token; num_blocks <= kChunkBlocks.
  void (*linear)(const LinearArgs& args, size_t block, size_t num_blocks, const Scratch& scratch);
  void (*rope)(const RopeArgs& args, size_t kv_head);  // k, v of one kv head and the q heads of its group
  void (*attention)(const AttentionArgs& args);
  void (*widen)(const uint16_t* bf16, float* out, size_t n);
};

const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_vnni_kernels();
const Kernels& avx512_bf16_kernels();
#endif

}  // namespace llmb
