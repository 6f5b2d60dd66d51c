// What the plan executor asks of an instruction set. Nothing here knows a vector register.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
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

struct AttentionKernels {
  void (*store_kv)(const HeadsArgs& args, size_t token, size_t kv_head);  // of one token into the cache
  void (*run)(const AttentionArgs& args);
  void (*fold)(const AttentionArgs& args);  // the partial results of all tiles
};

struct Kernels {
  const char* name;
  // Rows [0, num_rows) of x, optionally normalised (RMSNorm with weight), as activations from row `row` on
  // (the start of a panel).
  void (*activate)(const float* const* x, size_t num_rows, const float* norm_weight, float eps,
                   const Activations& out, size_t row);
  // Blocks [block, block + num_blocks) of the weight times every token; num_blocks <= kChunkBlocks.
  void (*linear)(const LinearArgs& args, size_t block, size_t num_blocks, const Scratch& scratch);
  AttentionKernels attention;
  void (*widen)(const uint16_t* bf16, float* out, size_t n);
};

const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_vnni_kernels();
const Kernels& avx512_bf16_kernels();
#endif

#if defined(LLMB_ISA)
namespace LLMB_ISA {
extern const AttentionKernels attention_kernels;
}
#endif

}  // namespace llmb
